"""The API's description by OpenAPI 3.1, written by hand; a test compares it with the routes."""

from importlib.metadata import version
from typing import Any

from leanclip.app.forms import MAX_IMAGES, MAX_PROMPTS, MAX_TEXTS
from leanclip.app.safety import MAX_BODY

Schema = dict[str, Any]

TEXT: Schema = {"type": "string"}
NUMBER: Schema = {"type": "number"}
INTEGER: Schema = {"type": "integer"}
TRUTH: Schema = {"type": "boolean"}
FILE: Schema = {"type": "string", "format": "binary"}


def list_of(items: Schema, **more: Any) -> Schema:
    """An array."""
    return {"type": "array", "items": items, **more}


def group(properties: dict[str, Schema], *, optional: tuple[str, ...] = ()) -> Schema:
    """An object whose properties are all there but the optional ones."""
    required = [name for name in properties if name not in optional]
    return {"type": "object", "properties": properties, "required": required}


def or_null(schema: Schema) -> Schema:
    """It, or null."""
    return {"anyOf": [schema, {"type": "null"}]}


IMAGE = FILE | {"description": "JPEG, PNG, BMP, WebP, GIF or TIFF; its bytes, never an address"}
LABELS = list_of(TEXT, minItems=2, description="words to choose from; a field may hold one a line")
TEMPLATES = list_of(TEXT, description="sentences with {} for the label; by default one")
TEXTS = list_of(TEXT, maxItems=MAX_TEXTS, description="a field may hold one a line")

LABEL_SET = group(
    {"name": TEXT, "labels": list_of(TEXT), "templates": list_of(TEXT)}, optional=("templates",)
)
MODEL = group({"name": TEXT, "resolution": INTEGER, "embed_dim": INTEGER, "context": INTEGER})
LIMITS = group({"request_bytes": INTEGER, "pixels": INTEGER, "images": INTEGER, "texts": INTEGER})
INDEX = group({"pictures": INTEGER, "labels": list_of(TEXT)})
STATE = {"enum": ["ready", "loading", "failed", "no model"]}
HIT = group(
    {
        "number": INTEGER,
        "score": NUMBER,
        "path": TEXT,
        "caption": or_null(TEXT),
        "label": or_null(TEXT),
    }
)
GUESS = group({"label": TEXT, "probability": NUMBER, "similarity": NUMBER})

SCHEMAS: dict[str, Schema] = {
    "Error": group({"error": TEXT}) | {"description": "what is wrong, in words"},
    "Health": group(
        {"status": STATE, "jobs": INTEGER, "passes": INTEGER}, optional=("jobs", "passes")
    )
    | {"description": "jobs of the model so far, and the passes that they took"},
    "About": group(
        {
            "version": TEXT,
            "state": STATE,
            "model": or_null(MODEL),
            "index": or_null(INDEX),
            "label_sets": list_of(LABEL_SET),
            "templates": list_of(TEXT),
            "limits": LIMITS,
        }
    ),
    "Comparison": group(
        {
            "texts": list_of(TEXT),
            "images": list_of(TEXT),
            "similarity": list_of(list_of(NUMBER), description="a row of cosines for each text"),
        }
    ),
    "Classification": group(
        {
            "image": TEXT,
            "calibrated": TRUTH,
            "none_of_these": TRUTH,
            "guesses": list_of(GUESS, description="the most probable first"),
        }
    ),
    "Hits": group(
        {
            "hits": list_of(HIT, description="the nearest first, from `offset` on"),
            "is_end": TRUTH | {"description": "there are no more"},
        }
    ),
}


def answer(schema: str, words: str) -> Schema:
    """A response of JSON."""
    content = {"application/json": {"schema": {"$ref": f"#/components/schemas/{schema}"}}}
    return {"description": words, "content": content}


def picture(words: str) -> Schema:
    """A response of a JPEG."""
    return {"description": words, "content": {"image/jpeg": {"schema": FILE}}}


ERRORS = {
    "400": "something given is missing or wrong",
    "401": "a token is needed",
    "403": "the Host or the Origin is another's",
    "404": "there is nothing of that name",
    "409": "the server was started without what this needs",
    "413": f"over {MAX_BODY >> 20} MB; refused before it is read",
    "415": "no form",
    "422": "an image that cannot be read",
    "503": "the model is being loaded, or too much waits for it; Retry-After says when",
}


def get(summary: str, good: Schema, *errors: str, parameters: list[Schema] | None = None) -> Schema:
    """A GET."""
    responses = {"200": good} | {code: answer("Error", ERRORS[code]) for code in errors}
    found = {"summary": summary, "responses": responses}
    return {"get": found | ({"parameters": parameters} if parameters else {})}


def query(name: str, schema: Schema, words: str, *, where: str = "query") -> Schema:
    """A parameter."""
    found = {"name": name, "in": where, "schema": schema, "description": words}
    return found | ({"required": True} if where == "path" else {})


def post(summary: str, good: Schema, fields: dict[str, Schema], *needed: str) -> Schema:
    """A POST of a form."""
    schema = {"type": "object", "properties": fields, "required": list(needed)}
    codes = [code for code in ERRORS if code != "404"]
    return {
        "post": {
            "summary": summary,
            "requestBody": {
                "required": True,
                "content": {"multipart/form-data": {"schema": schema}},
            },
            "responses": {"200": good} | {code: answer("Error", ERRORS[code]) for code in codes},
        }
    }


PAGING: dict[str, tuple[Schema, str]] = {
    "offset": (INTEGER | {"minimum": 0, "default": 0}, "hits to leave out"),
    "limit": (INTEGER | {"minimum": 1, "maximum": 200, "default": 30}, "hits to give"),
    "label": (TEXT, "only pictures with this label"),
}

PATHS: dict[str, Schema] = {
    "/healthz": get("Whether requests are answered", answer("Health", "they are")),
    "/api/about": get("The model, label sets and limits", answer("About", "what there is"), "401"),
    "/api/compare": post(
        "Cosine similarities of images and texts",
        answer("Comparison", "a matrix"),
        {"images": list_of(IMAGE, maxItems=MAX_IMAGES), "texts": TEXTS},
        *("images", "texts"),
    ),
    "/api/classify": post(
        f"Which label fits an image; labels times templates are {MAX_PROMPTS} at most",
        answer("Classification", "labels with probabilities"),
        {
            "image": IMAGE,
            "labels": LABELS,
            "templates": TEMPLATES,
            "top": INTEGER | {"minimum": 1, "default": 5},
        },
        *("image", "labels"),
    ),
    "/api/attention": post(
        "Where the model looked, for texts whose mean is taken, or without any",
        picture("the square that the model saw, under a heat map"),
        {"image": IMAGE, "texts": TEXTS},
        "image",
    ),
    "/api/search": {
        **get(
            "Pictures of the index by words, or like one of them",
            answer("Hits", "a part of what was found"),
            *("400", "401", "404", "409", "503"),
            parameters=[
                query("q", TEXT, "words"),
                query("without", TEXT, "words for what is not wanted"),
                query("like", INTEGER, "the number of a picture, in place of words"),
                *(query(name, *more) for name, more in PAGING.items()),
            ],
        ),
        **post(
            "Pictures of the index by a picture",
            answer("Hits", "a part of what was found"),
            {"image": IMAGE, **{name: schema for name, (schema, _) in PAGING.items()}},
            "image",
        ),
    },
    "/api/pictures/{number}": get(
        "A picture of the index, encoded anew",
        picture("it, its long side at most `side` pixels"),
        *("400", "401", "404", "409", "422", "503"),
        parameters=[
            query("number", INTEGER, "of a hit", where="path"),
            query("side", INTEGER | {"minimum": 64, "maximum": 1024, "default": 320}, "pixels"),
        ],
    ),
}
PATHS["/healthz"]["get"]["responses"]["503"] = answer("Health", "the model is being loaded")


def description() -> dict[str, Any]:
    """The whole."""
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "leanclip",
            "version": version("leanclip"),
            "description": "The API behind `leanclip app`. Errors are JSON with `error`, a "
            "sentence. Requests of several people are put to the model together.",
        },
        "paths": PATHS,
        "components": {
            "schemas": SCHEMAS,
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{}, {"token": []}],
    }
