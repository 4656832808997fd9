"""Class names and templates of known data sets, each with its source.

For other data sets they come from text files, one per line: docs/evaluate.md.
"""

from typing import NamedTuple

from leanclip.config.model import ModelConfig

# The default of CLIP's paper, section 3.1.4.
TEMPLATES = ("a photo of a {}.",)
# Of transformers' zero-shot pipeline, which SigLIP's and SigLIP 2's model cards use.
SIGLIP_TEMPLATES = ("This is a photo of {}.",)
# One of Chinese-CLIP's, cn_clip/eval/cvinw_zeroshot_templates.py: "a photo of {}".
CHINESE_TEMPLATES = ("一张{}的照片",)


def default_templates(config: ModelConfig) -> tuple[str, ...]:
    """The prompts of a model's family, where none are given.

    Chinese-CLIP is told by a BERT whose class token has a linear projection; the text towers of
    BiomedCLIP and XLM-R have another pool or projection.
    """
    is_class_token = config.transformer_pool == "first" and not config.transformer_pooler
    if config.transformer_post_norm and is_class_token:
        return CHINESE_TEMPLATES if config.transformer_projection == "linear" else TEMPLATES
    return SIGLIP_TEMPLATES if config.logit_bias else TEMPLATES


class Prompts(NamedTuple):
    """Class names of a data set, by label, and templates for captions."""

    classes: tuple[str, ...]
    templates: tuple[str, ...]
    source: str


def _names(words: str) -> tuple[str, ...]:
    return tuple(words.split(", "))


# For training on Food-101, so that captions vary within a class.
FOOD101_TRAINING = (
    "a photo of {}, a type of food.",
    "a photo of {}.",
    "a plate of {}.",
    "{}, a dish.",
    "a close-up photo of {}.",
)

PROMPTS = {
    "food101": Prompts(
        classes=_names(
            "apple pie, baby back ribs, baklava, beef carpaccio, beef tartare, beet salad, "
            "beignets, bibimbap, bread pudding, breakfast burrito, bruschetta, caesar salad, "
            "cannoli, caprese salad, carrot cake, ceviche, cheesecake, cheese plate, chicken "
            "curry, chicken quesadilla, chicken wings, chocolate cake, chocolate mousse, "
            "churros, clam chowder, club sandwich, crab cakes, creme brulee, croque madame, "
            "cup cakes, deviled eggs, donuts, dumplings, edamame, eggs benedict, escargots, "
            "falafel, filet mignon, fish and chips, foie gras, french fries, french onion "
            "soup, french toast, fried calamari, fried rice, frozen yogurt, garlic bread, "
            "gnocchi, greek salad, grilled cheese sandwich, grilled salmon, guacamole, gyoza, "
            "hamburger, hot and sour soup, hot dog, huevos rancheros, hummus, ice cream, "
            "lasagna, lobster bisque, lobster roll sandwich, macaroni and cheese, macarons, "
            "miso soup, mussels, nachos, omelette, onion rings, oysters, pad thai, paella, "
            "pancakes, panna cotta, peking duck, pho, pizza, pork chop, poutine, prime rib, "
            "pulled pork sandwich, ramen, ravioli, red velvet cake, risotto, samosa, sashimi, "
            "scallops, seaweed salad, shrimp and grits, spaghetti bolognese, spaghetti "
            "carbonara, spring rolls, steak, strawberry shortcake, sushi, tacos, takoyaki, "
            "tiramisu, tuna tartare, waffles"
        ),
        templates=("a photo of {}, a type of food.",),
        source="names: the archive's meta/labels.txt, in lower case; template: openai/CLIP, "
        "data/prompts.md",
    ),
    "shapes": Prompts(
        classes=_names(
            "dotted black square, dotted black triangle, dotted blue square, dotted brown "
            "heart, dotted orange square, dotted yellow cross, hollow blue cross, hollow "
            "brown star, hollow green circle, hollow purple heart, hollow red star, hollow "
            "yellow cross, plain black circle, plain blue triangle, plain brown cross, plain "
            "green square, plain orange triangle, plain yellow heart, plain yellow square, "
            "striped blue star, striped green heart, striped green star, striped purple "
            "triangle, striped yellow star"
        ),
        templates=("a {}", "a picture of a {}", "a large {}", "a small {}", "there is a {}"),
        source="leanclip's own drawings: data/shapes.py",
    ),
}
