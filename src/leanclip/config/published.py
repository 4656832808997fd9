"""Published models by name, with their repositories on Hugging Face's hub.

    NAME::TAG     an architecture and its weights, by open_clip's names
    NAME          the architecture alone: its only weights, or OpenAI's if there are several
    REPOSITORY    owner/name, or the name alone

From open_clip's src/open_clip/pretrained.py (June 2026) and the authors' own repositories. Models
that leanclip cannot read are not listed.
"""

from collections.abc import Iterator
from typing import NamedTuple

# family -> architecture -> tag -> repository; the tag openai: OpenAI's own files (hub.py)
PAIRS: dict[str, dict[str, dict[str, str]]] = {
    "CLIP": {
        "RN50": {
            "openai": "",
            "yfcc15m": "timm/resnet50_clip.yfcc15m",
            "cc12m": "timm/resnet50_clip.cc12m",
        },
        "RN101": {"openai": "", "yfcc15m": "timm/resnet101_clip.yfcc15m"},
        "RN50x4": {"openai": ""},
        "RN50x16": {"openai": ""},
        "RN50x64": {"openai": ""},
        "ViT-B-32": {
            "openai": "",
            "laion400m_e31": "timm/vit_base_patch32_clip_224.laion400m_e31",
            "laion400m_e32": "timm/vit_base_patch32_clip_224.laion400m_e32",
            "laion2b_e16": "timm/vit_base_patch32_clip_224.laion2b_e16",
            "laion2b_s34b_b79k": "laion/CLIP-ViT-B-32-laion2B-s34B-b79K",
            "datacomp_xl_s13b_b90k": "laion/CLIP-ViT-B-32-DataComp.XL-s13B-b90K",
            "datacomp_m_s128m_b4k": "laion/CLIP-ViT-B-32-DataComp.M-s128M-b4K",
            "commonpool_m_clip_s128m_b4k": "laion/CLIP-ViT-B-32-CommonPool.M.clip-s128M-b4K",
            "commonpool_m_laion_s128m_b4k": "laion/CLIP-ViT-B-32-CommonPool.M.laion-s128M-b4K",
            "commonpool_m_image_s128m_b4k": "laion/CLIP-ViT-B-32-CommonPool.M.image-s128M-b4K",
            "commonpool_m_text_s128m_b4k": "laion/CLIP-ViT-B-32-CommonPool.M.text-s128M-b4K",
            "commonpool_m_basic_s128m_b4k": "laion/CLIP-ViT-B-32-CommonPool.M.basic-s128M-b4K",
            "commonpool_m_s128m_b4k": "laion/CLIP-ViT-B-32-CommonPool.M-s128M-b4K",
            "datacomp_s_s13m_b4k": "laion/CLIP-ViT-B-32-DataComp.S-s13M-b4K",
            "commonpool_s_clip_s13m_b4k": "laion/CLIP-ViT-B-32-CommonPool.S.clip-s13M-b4K",
            "commonpool_s_laion_s13m_b4k": "laion/CLIP-ViT-B-32-CommonPool.S.laion-s13M-b4K",
            "commonpool_s_image_s13m_b4k": "laion/CLIP-ViT-B-32-CommonPool.S.image-s13M-b4K",
            "commonpool_s_text_s13m_b4k": "laion/CLIP-ViT-B-32-CommonPool.S.text-s13M-b4K",
            "commonpool_s_basic_s13m_b4k": "laion/CLIP-ViT-B-32-CommonPool.S.basic-s13M-b4K",
            "commonpool_s_s13m_b4k": "laion/CLIP-ViT-B-32-CommonPool.S-s13M-b4K",
        },
        "ViT-B-32-256": {"datacomp_s34b_b86k": "laion/CLIP-ViT-B-32-256x256-DataComp-s34B-b86K"},
        "ViT-B-16": {
            "openai": "",
            "laion400m_e31": "timm/vit_base_patch16_clip_224.laion400m_e31",
            "laion400m_e32": "timm/vit_base_patch16_clip_224.laion400m_e32",
            "laion2b_s34b_b88k": "laion/CLIP-ViT-B-16-laion2B-s34B-b88K",
            "datacomp_xl_s13b_b90k": "laion/CLIP-ViT-B-16-DataComp.XL-s13B-b90K",
            "datacomp_l_s1b_b8k": "laion/CLIP-ViT-B-16-DataComp.L-s1B-b8K",
            "commonpool_l_clip_s1b_b8k": "laion/CLIP-ViT-B-16-CommonPool.L.clip-s1B-b8K",
            "commonpool_l_laion_s1b_b8k": "laion/CLIP-ViT-B-16-CommonPool.L.laion-s1B-b8K",
            "commonpool_l_image_s1b_b8k": "laion/CLIP-ViT-B-16-CommonPool.L.image-s1B-b8K",
            "commonpool_l_text_s1b_b8k": "laion/CLIP-ViT-B-16-CommonPool.L.text-s1B-b8K",
            "commonpool_l_basic_s1b_b8k": "laion/CLIP-ViT-B-16-CommonPool.L.basic-s1B-b8K",
            "commonpool_l_s1b_b8k": "laion/CLIP-ViT-B-16-CommonPool.L-s1B-b8K",
        },
        "ViT-B-16-plus-240": {
            "laion400m_e31": "timm/vit_base_patch16_plus_clip_240.laion400m_e31",
        },
        "ViT-L-14": {
            "openai": "",
            "laion400m_e31": "timm/vit_large_patch14_clip_224.laion400m_e31",
            "laion400m_e32": "timm/vit_large_patch14_clip_224.laion400m_e32",
            "laion2b_s32b_b82k": "laion/CLIP-ViT-L-14-laion2B-s32B-b82K",
            "datacomp_xl_s13b_b90k": "laion/CLIP-ViT-L-14-DataComp.XL-s13B-b90K",
            "commonpool_xl_clip_s13b_b90k": "laion/CLIP-ViT-L-14-CommonPool.XL.clip-s13B-b90K",
            "commonpool_xl_laion_s13b_b90k": "laion/CLIP-ViT-L-14-CommonPool.XL.laion-s13B-b90K",
            "commonpool_xl_s13b_b90k": "laion/CLIP-ViT-L-14-CommonPool.XL-s13B-b90K",
        },
        "ViT-L-14-336": {"openai": ""},
        "ViT-H-14": {"laion2b_s32b_b79k": "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"},
        "ViT-g-14": {
            "laion2b_s12b_b42k": "laion/CLIP-ViT-g-14-laion2B-s12B-b42K",
            "laion2b_s34b_b88k": "laion/CLIP-ViT-g-14-laion2B-s34B-b88K",
        },
        "ViT-bigG-14": {"laion2b_s39b_b160k": "laion/CLIP-ViT-bigG-14-laion2B-39B-b160k"},
    },
    "MetaCLIP": {
        "ViT-B-32": {
            "metaclip_400m": "timm/vit_base_patch32_clip_224.metaclip_400m",
            "metaclip_fullcc": "timm/vit_base_patch32_clip_224.metaclip_2pt5b",
        },
        "ViT-B-16": {
            "metaclip_400m": "timm/vit_base_patch16_clip_224.metaclip_400m",
            "metaclip_fullcc": "timm/vit_base_patch16_clip_224.metaclip_2pt5b",
        },
        "ViT-L-14": {
            "metaclip_400m": "timm/vit_large_patch14_clip_224.metaclip_400m",
            "metaclip_fullcc": "timm/vit_large_patch14_clip_224.metaclip_2pt5b",
        },
        "ViT-H-14": {
            "metaclip_fullcc": "timm/vit_huge_patch14_clip_224.metaclip_2pt5b",
            "metaclip_altogether": "timm/vit_huge_patch14_clip_224.metaclip_altogether",
        },
        "ViT-bigG-14": {"metaclip_fullcc": "timm/vit_gigantic_patch14_clip_224.metaclip_2pt5b"},
    },
    "DFN": {
        "ViT-B-16": {"dfn2b": "apple/DFN2B-CLIP-ViT-B-16"},
        "ViT-L-14": {
            "dfn2b": "apple/DFN2B-CLIP-ViT-L-14",
            "dfn2b_s39b": "apple/DFN2B-CLIP-ViT-L-14-39B",
        },
        "ViT-H-14": {"dfn5b": "apple/DFN5B-CLIP-ViT-H-14"},
        "ViT-H-14-378": {"dfn5b": "apple/DFN5B-CLIP-ViT-H-14-378"},
    },
    "CLIPA": {
        "ViT-L-14-CLIPA": {"datacomp1b": "UCSC-VLAA/ViT-L-14-CLIPA-datacomp1B"},
        "ViT-L-14-CLIPA-336": {"datacomp1b": "UCSC-VLAA/ViT-L-14-CLIPA-336-datacomp1B"},
        "ViT-H-14-CLIPA": {"datacomp1b": "UCSC-VLAA/ViT-H-14-CLIPA-datacomp1B"},
        "ViT-H-14-CLIPA-336": {
            "laion2b": "UCSC-VLAA/ViT-H-14-CLIPA-336-laion2B",
            "datacomp1b": "UCSC-VLAA/ViT-H-14-CLIPA-336-datacomp1B",
        },
        "ViT-bigG-14-CLIPA": {"datacomp1b": "UCSC-VLAA/ViT-bigG-14-CLIPA-datacomp1B"},
        "ViT-bigG-14-CLIPA-336": {"datacomp1b": "UCSC-VLAA/ViT-bigG-14-CLIPA-336-datacomp1B"},
    },
    "CoCa": {
        "coca_ViT-B-32": {
            "laion2b_s13b_b90k": "laion/CoCa-ViT-B-32-laion2B-s13B-b90k",
            "mscoco_finetuned_laion2b_s13b_b90k": "laion/mscoco_finetuned_CoCa-ViT-B-32"
            "-laion2B-s13B-b90k",
        },
        "coca_ViT-L-14": {
            "laion2b_s13b_b90k": "laion/CoCa-ViT-L-14-laion2B-s13B-b90k",
            "mscoco_finetuned_laion2b_s13b_b90k": "laion/mscoco_finetuned_CoCa-ViT-L-14"
            "-laion2B-s13B-b90k",
        },
    },
    "CLIP with RoBERTa": {
        "roberta-ViT-B-32": {
            "laion2b_s12b_b32k": "laion/CLIP-ViT-B-32-roberta-base-laion2B-s12B-b32k",
        },
        "xlm-roberta-base-ViT-B-32": {
            "laion5b_s13b_b90k": "laion/CLIP-ViT-B-32-xlm-roberta-base-laion5B-s13B-b90k",
        },
        "xlm-roberta-large-ViT-H-14": {
            "frozen_laion5b_s13b_b90k": "laion/CLIP-ViT-H-14-frozen-xlm-roberta-large"
            "-laion5B-s13B-b90k",
        },
    },
    "SigLIP": {
        "ViT-B-16-SigLIP": {"webli": "timm/ViT-B-16-SigLIP"},
        "ViT-B-16-SigLIP-256": {"webli": "timm/ViT-B-16-SigLIP-256"},
        "ViT-B-16-SigLIP-i18n-256": {"webli": "timm/ViT-B-16-SigLIP-i18n-256"},
        "ViT-B-16-SigLIP-384": {"webli": "timm/ViT-B-16-SigLIP-384"},
        "ViT-B-16-SigLIP-512": {"webli": "timm/ViT-B-16-SigLIP-512"},
        "ViT-L-16-SigLIP-256": {"webli": "timm/ViT-L-16-SigLIP-256"},
        "ViT-L-16-SigLIP-384": {"webli": "timm/ViT-L-16-SigLIP-384"},
        "ViT-SO400M-14-SigLIP": {"webli": "timm/ViT-SO400M-14-SigLIP"},
        "ViT-SO400M-16-SigLIP-i18n-256": {"webli": "timm/ViT-SO400M-16-SigLIP-i18n-256"},
        "ViT-SO400M-14-SigLIP-384": {"webli": "timm/ViT-SO400M-14-SigLIP-384"},
    },
    "SigLIP 2": {
        "ViT-B-32-SigLIP2-256": {"webli": "timm/ViT-B-32-SigLIP2-256"},
        "ViT-B-16-SigLIP2": {"webli": "timm/ViT-B-16-SigLIP2"},
        "ViT-B-16-SigLIP2-256": {"webli": "timm/ViT-B-16-SigLIP2-256"},
        "ViT-B-16-SigLIP2-384": {"webli": "timm/ViT-B-16-SigLIP2-384"},
        "ViT-B-16-SigLIP2-512": {"webli": "timm/ViT-B-16-SigLIP2-512"},
        "ViT-B-16-SigLIP2-naflex": {"webli": "google/siglip2-base-patch16-naflex"},
        "ViT-L-16-SigLIP2-256": {"webli": "timm/ViT-L-16-SigLIP2-256"},
        "ViT-L-16-SigLIP2-384": {"webli": "timm/ViT-L-16-SigLIP2-384"},
        "ViT-L-16-SigLIP2-512": {"webli": "timm/ViT-L-16-SigLIP2-512"},
        "ViT-SO400M-14-SigLIP2": {"webli": "timm/ViT-SO400M-14-SigLIP2"},
        "ViT-SO400M-14-SigLIP2-378": {"webli": "timm/ViT-SO400M-14-SigLIP2-378"},
        "ViT-SO400M-16-SigLIP2-256": {"webli": "timm/ViT-SO400M-16-SigLIP2-256"},
        "ViT-SO400M-16-SigLIP2-384": {"webli": "timm/ViT-SO400M-16-SigLIP2-384"},
        "ViT-SO400M-16-SigLIP2-512": {"webli": "timm/ViT-SO400M-16-SigLIP2-512"},
        "ViT-SO400M-16-SigLIP2-naflex": {"webli": "google/siglip2-so400m-patch16-naflex"},
        "ViT-gopt-16-SigLIP2-256": {"webli": "timm/ViT-gopt-16-SigLIP2-256"},
        "ViT-gopt-16-SigLIP2-384": {"webli": "timm/ViT-gopt-16-SigLIP2-384"},
    },
    "PE-Core": {
        "PE-Core-T-16-384": {"meta": "timm/PE-Core-T-16-384"},
        "PE-Core-S-16-384": {"meta": "timm/PE-Core-S-16-384"},
        "PE-Core-B-16": {"meta": "timm/PE-Core-B-16"},
        "PE-Core-L-14-336": {"meta": "timm/PE-Core-L-14-336"},
        "PE-Core-bigG-14-448": {"meta": "timm/PE-Core-bigG-14-448"},
    },
    "MetaCLIP 2": {
        "ViT-H-14-worldwide": {
            "metaclip2_worldwide": "timm/vit_huge_patch14_clip_224.metaclip2_worldwide",
        },
        "ViT-H-14-worldwide-378": {
            "metaclip2_worldwide": "timm/vit_huge_patch14_clip_378.metaclip2_worldwide",
        },
        "ViT-bigG-14-worldwide": {
            "metaclip2_worldwide": "timm/vit_gigantic_patch14_clip_224.metaclip2_worldwide",
        },
        "ViT-bigG-14-worldwide-378": {
            "metaclip2_worldwide": "timm/vit_gigantic_patch14_clip_378.metaclip2_worldwide",
        },
    },
}

# family -> owner -> repositories, in the form of transformers or of the authors' own code
REPOSITORIES: dict[str, dict[str, tuple[str, ...]]] = {
    "CLIP": {
        "openai": (
            "clip-vit-base-patch32",
            "clip-vit-base-patch16",
            "clip-vit-large-patch14",
            "clip-vit-large-patch14-336",
        )
    },
    "MetaCLIP": {
        "facebook": (
            "metaclip-b32-400m",
            "metaclip-b16-400m",
            "metaclip-l14-400m",
            "metaclip-b32-fullcc2.5b",
            "metaclip-b16-fullcc2.5b",
            "metaclip-l14-fullcc2.5b",
            "metaclip-h14-fullcc2.5b",
        )
    },
    "Long-CLIP": {
        "BeichenZhang": ("LongCLIP-B", "LongCLIP-B-32", "LongCLIP-L", "LongCLIP-L-336px"),
    },
    "SigLIP": {
        "google": (
            "siglip-base-patch16-224",
            "siglip-base-patch16-256",
            "siglip-base-patch16-256-multilingual",
            "siglip-base-patch16-384",
            "siglip-base-patch16-512",
            "siglip-large-patch16-256",
            "siglip-large-patch16-384",
            "siglip-so400m-patch14-224",
            "siglip-so400m-patch14-384",
            "siglip-so400m-patch16-256-i18n",
        )
    },
    "SigLIP 2": {
        "google": (
            "siglip2-base-patch32-256",
            "siglip2-base-patch16-224",
            "siglip2-base-patch16-256",
            "siglip2-base-patch16-384",
            "siglip2-base-patch16-512",
            "siglip2-base-patch16-naflex",
            "siglip2-large-patch16-256",
            "siglip2-large-patch16-384",
            "siglip2-large-patch16-512",
            "siglip2-so400m-patch14-224",
            "siglip2-so400m-patch14-384",
            "siglip2-so400m-patch16-256",
            "siglip2-so400m-patch16-384",
            "siglip2-so400m-patch16-512",
            "siglip2-so400m-patch16-naflex",
            "siglip2-giant-opt-patch16-256",
            "siglip2-giant-opt-patch16-384",
        )
    },
    "PE-Core": {
        "facebook": (
            "PE-Core-T16-384",
            "PE-Core-S16-384",
            "PE-Core-B16-224",
            "PE-Core-L14-336",
            "PE-Core-G14-448",
        )
    },
    "MetaCLIP 2": {
        "facebook": (
            "metaclip-2-worldwide-s16",
            "metaclip-2-worldwide-m16",
            "metaclip-2-worldwide-b32",
            "metaclip-2-worldwide-b16",
            "metaclip-2-worldwide-l14",
            "metaclip-2-worldwide-huge-quickgelu",
            "metaclip-2-worldwide-huge-378",
            "metaclip-2-worldwide-giant",
            "metaclip-2-worldwide-giant-378",
        )
    },
    "Chinese-CLIP": {
        "OFA-Sys": (
            "chinese-clip-vit-base-patch16",
            "chinese-clip-vit-large-patch14",
            "chinese-clip-vit-large-patch14-336px",
            "chinese-clip-vit-huge-patch14",
        )
    },
    "BiomedCLIP": {"microsoft": ("BiomedCLIP-PubMedBERT_256-vit_base_patch16_224",)},
}

# Weights with QuickGELU, which open_clip also names ARCHITECTURE-quickgelu::TAG.
_QUICK_TAGS = ("openai", "yfcc15m", "cc12m", "metaclip_400m", "metaclip_fullcc", "dfn2b", "dfn5b")
_QUICK_PAIRS = (
    "ViT-B-32::laion400m_e31",
    "ViT-B-32::laion400m_e32",
    "ViT-H-14-worldwide::metaclip2_worldwide",
)
_NOT_READ = {  # how the name of an architecture starts: what it is
    "convnext": "a ConvNeXt",
    "EVA": "an EVA",
    "ViTamin": "a ViTamin",
    "swin": "a Swin Transformer",
    "MobileCLIP": "a MobileCLIP",
    "nllb-clip": "a CLIP with NLLB's text tower",
    "mt5": "a CLIP with mT5's text tower",
    "CLAP": "a model of sound",
}


class Published(NamedTuple):
    """A model that can be fetched by name."""

    name: str  # the shortest that is unique
    family: str
    repository: str  # on the hub; "" for OpenAI's own files
    architecture: str  # open_clip's name; "" if the repository has none


def published() -> Iterator[Published]:
    """Every published model, by family."""
    families = dict.fromkeys((*PAIRS, *REPOSITORIES))
    for family in families:
        for architecture, weights in PAIRS.get(family, {}).items():
            for tag, repository in weights.items():
                yield Published(f"{architecture}::{tag}", family, repository, architecture)
        for owner, names in REPOSITORIES.get(family, {}).items():
            for name in names:
                yield Published(name, family, f"{owner}/{name}", "")


def find(name: str) -> list[Published]:
    """The models that a name stands for; several: only an architecture is named.

    Of several that include OpenAI's, those are meant.
    """
    head, _, tag = name.partition("::")
    plain = head.removesuffix("-quickgelu")
    found = []
    for one in published():
        architecture, _, own_tag = one.name.partition("::")
        is_quick = own_tag in _QUICK_TAGS or one.name in _QUICK_PAIRS
        if one.architecture:
            if architecture == (plain if is_quick else head) and tag in ("", own_tag):
                found.append(one)
        elif name == one.name:
            found.append(one)
    if not found and not tag:
        found = [one for one in published() if name == one.repository.rpartition("/")[2]]
    return [one for one in found if not one.repository] or found


def names() -> list[str]:
    """Every name that stands for one model, but open_clip's with -quickgelu."""
    found: dict[str, None] = {}
    for one in published():
        found |= dict.fromkeys((one.name, one.architecture or one.name))
        found |= dict.fromkeys((one.repository, one.repository.rpartition("/")[2]))
    return [name for name in found if name and len(find(name)) <= 1]


def why_not_read(name: str) -> str | None:
    """What a model of open_clip is whose architecture leanclip lacks."""
    starts = (what for start, what in _NOT_READ.items() if name.startswith(start))
    return next(starts, None)
