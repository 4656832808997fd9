"""Captions from a seeded grammar: plain ones as COCO's, and mixed ones as the web's."""

import random

from leanclip.preprocess.tokenizer import vocabulary

LISTS = {
    "who": "man woman boy girl child dog cat horse bird couple group player rider chef baby cow",
    "what": "umbrella skateboard frisbee sandwich kite laptop surfboard pizza bicycle suitcase "
    "guitar camera phone toothbrush banana cake plate book bottle tie",
    "like": "young old small large brown black white red happy wooden colorful blue empty tall",
    "does": "sitting standing riding holding eating watching walking playing looking sleeping",
    "where": "on in near behind under by above across at beside",
    "place": "street beach kitchen field table park room river window mountain train station",
    "odd": "café naïve façade jalapeño “vintage” ‘retro’ women’s l’été Zürich – — … São 20°C m² ½ "
    "Beyoncé crème brûlée &amp; &quot;new&quot; men&#39;s &nbsp; Dolce&Gabbana ® ™ • piñata ♥",
}
WORDS = {name: words.split(" ") for name, words in LISTS.items()}
RARE = [s[:-4] for s in vocabulary() if s[:-4].isalpha() and s.isascii() and len(s) > 7]


def plain_caption(rng: random.Random) -> str:
    """A sentence as COCO's: "A young man riding a red bicycle near the old beach."."""
    w = {name: rng.choice(words) for name, words in WORDS.items()}
    sentence = f"A {w['like']} {w['who']} {w['does']} {w['where']} a {w['place']}"
    if rng.random() < 0.7:
        sentence += f" with a {rng.choice(WORDS['like'])} {w['what']}"
    if rng.random() < 0.5:
        sentence += f" and a {rng.choice(WORDS['who'])}"
    return sentence + rng.choice(("", ".", ".", " ."))


def mixed_caption(rng: random.Random) -> str:
    """A text as the web's: "Red Kite Festival 2016 - photo by Sandra | IMG_4053.jpg"."""
    words = plain_caption(rng).split(" ")
    for _ in range(rng.randint(0, 3)):
        words[rng.randrange(len(words))] = RARE[int(len(RARE) ** rng.random())]  # after Zipf
    if rng.random() < 0.3:
        words = [word.title() for word in words]
    if rng.random() < 0.4:
        number = rng.randrange(10_000)
        extra = (
            f"({number})",
            f"${number / 100}",
            "-",
            "|",
            f"IMG_{number}.jpg",
            f"{number % 40},",
        )
        words.insert(rng.randrange(len(words)), rng.choice(extra))
    if rng.random() < 1 / 12:
        words[rng.randrange(len(words))] = rng.choice(WORDS["odd"])
    return " ".join(words[:15])
