"""One of each of timm's families: the smallest, on an image of the size that it was made for.

A family is what one of timm's files calls by one name: ``byobnet`` has gernet, repvgg, mobileone and more. Its models
for tests don't count. ``python -m benchmarks.coverage.timm`` builds them all without data, and prints SMALLEST anew.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from armopt.models import references, timm_models, torchvision_ops
from benchmarks import random_weights
from benchmarks.coverage.cases import Case, Sample

SECTION = "timm"
#: File of timm -> the smallest of each of its families.
SMALLEST = {
    "beit": "beit_base_patch16_224 beitv2_base_patch16_224",
    "byoanet": (
        "botnet26t_256 eca_botnext26ts_256 halo2botnet50ts_256 halonet_h1 haloregnetz_b lambda_resnet26t "
        "lamhalobotnet50ts_256 sebotnet33ts_256 sehalonet33ts"
    ),
    "byobnet": (
        "bat_resnext26ts eca_resnext26ts gcresnet33ts gcresnext26ts gernet_s mobileone_s1 regnetz_b16 "
        "repvgg_a0 resnet32ts resnext26ts seresnet33ts seresnext26ts"
    ),
    "cait": "cait_xxs24_224",
    "coat": "coat_tiny",
    "convit": "convit_tiny",
    "convmixer": "convmixer_768_32",
    "convnext": "convnext_zepto_rms convnextv2_atto",
    "cpubone": "cpubone_nano",
    "crossvit": "crossvit_tiny_240",
    "csatv2": "csatv2",
    "cspnet": "cs3darknet_focus_s cspdarknet53 cspresnet50 cspresnext50 darknet17 darknetaa53 sedarknet21",
    "cspnext": "cspnext_tiny",
    "davit": "davit_tiny",
    "deepseek_vit": "deepseek_vit_412m",
    "deit": "deit_tiny_patch16_224",
    "densenet": "densenet121 densenetblur121d",
    "dla": "dla46x_c",
    "dpn": "dpn48b",
    "edgenext": "edgenext_xx_small",
    "efficientformer": "efficientformer_l1",
    "efficientformer_v2": "efficientformerv2_s0",
    "efficientnet": (
        "efficientnet_lite0 efficientnetv2_rw_t fbnetc_100 gc_efficientnetv2_rw_t mixnet_s mnasnet_small "
        "mobilenet_edgetpu_100 mobilenetv2_035 semnasnet_050 spnasnet_100 tf_efficientnet_lite0 "
        "tf_efficientnetv2_b0 tf_mixnet_s tinynet_e"
    ),
    "efficientvim": "efficientvim_m1",
    "efficientvit_mit": "efficientvit_b0",
    "efficientvit_msra": "efficientvit_m0",
    "eva": "eva02_tiny_patch14_224 vit_tiny_patch16_dinov3_qkvb",
    "fasternet": "fasternet_t0",
    "fastvit": "fastvit_t8",
    "focalnet": "focalnet_tiny_srf",
    "gcvit": "gcvit_xxtiny",
    "gemma4_vit": "gemma4_vit_167m",
    "ghostnet": "ghostnet_050 ghostnetv3_050",
    "hardcorenas": "hardcorenas_b",
    "hgnet": "hgnet_tiny hgnetv2_b0",
    "hiera": "hiera_tiny_224",
    "hieradet_sam2": "hieradet_small sam2_hiera_tiny",
    "hrnet": "hrnet_w18_small",
    "iformer": "iformer_t",
    "inception_next": "inception_next_atto",
    "inception_resnet_v2": "inception_resnet_v2",
    "inception_v3": "inception_v3",
    "inception_v4": "inception_v4",
    "lcnetv2": "lcnetv2_small",
    "levit": "levit_128s",
    "lowformer": "lowformer_b0",
    "mambaout": "mambaout_femto",
    "maxxvit": (
        "coatnet_pico_rw_224 coatnext_nano_rw_224 maxvit_pico_rw_256 maxxvit_rmlp_nano_rw_256 maxxvitv2_nano_rw_256"
    ),
    "metaformer": "caformer_s18 convformer_s18 poolformer_s12 poolformerv2_s12",
    "mlp_mixer": "gmixer_12_224 gmlp_ti16_224 mixer_s16_224 resmlp_12_224",
    "mobilenetv3": "fbnetv3_b lcnet_035 mobilenetv3_small_050 tf_mobilenetv3_small_075",
    "mobilenetv5": "mobilenetv5_base",
    "mobilevit": "mobilevit_xxs mobilevitv2_050",
    "mvitv2": "mvitv2_tiny",
    "naflexvit": "naflexvit_base_patch16_parfac_gap",
    "nasnet": "nasnetalarge",
    "nest": "nest_tiny",
    "nextvit": "nextvit_small",
    "nfnet": "dm_nfnet_f0 eca_nfnet_l0 nf_regnet_b0 nfnet_l0",
    "pit": "pit_ti_224",
    "pnasnet": "pnasnet5large",
    "pvt_v2": "pvt_v2_b0",
    "qwen3_vit": "qwen3_vit_88m",
    "rdnet": "rdnet_tiny",
    "regnet": "regnetv_040 regnetx_002 regnety_002 regnetz_005",
    "repghost": "repghostnet_050",
    "repvit": "repvit_m1",
    "res2net": "res2next50",
    "resnest": "resnest14d",
    "resnet": (
        "ecaresnet26t ecaresnetlight ecaresnext26t_32x4d resnet10t resnetaa34d resnetblur18 resnetrs50 "
        "resnext50_32x4d senet154 seresnet18 seresnetaa50d seresnext26t_32x4d seresnextaa101d_32x8d "
        "wide_resnet50_2"
    ),
    "resnetv2": "resnetv2_18",
    "rexnet": "rexnet_100 rexnetr_100",
    "selecsls": "selecsls42",
    "senet": "legacy_senet154 legacy_seresnet18 legacy_seresnext26_32x4d",
    "sequencer": "sequencer2d_s",
    "shvit": "shvit_s1",
    "sknet": "skresnet18 skresnext50_32x4d",
    "starnet": "starnet_s050",
    "swiftformer": "swiftformer_xs",
    "swin_transformer": "swin_tiny_patch4_window7_224",
    "swin_transformer_v2": "swinv2_tiny_window16_256",
    "swin_transformer_v2_cr": "swinv2_cr_tiny_224",
    "tiny_vit": "tiny_vit_5m_224",
    "tnt": "tnt_s_legacy_patch16_224",
    "tresnet": "tresnet_m",
    "twins": "twins_svt_small",
    "vgg": "vgg11",
    "visformer": "visformer_tiny",
    "vision_transformer": (
        "aimv2_large_patch14_224 beit3_base_patch16_224 eva_large_patch14_196 flexivit_small vit_tiny_patch16_224"
    ),
    "vision_transformer_hybrid": "vit_tiny_r_s16_p8_224",
    "vision_transformer_relpos": "vit_srelpos_small_patch16_224",
    "vision_transformer_sam": "samvit_base_patch16_224",
    "vitamin": "vitamin_small_224",
    "volo": "volo_d1_224",
    "vovnet": "eca_vovnet39b ese_vovnet19b_slim_dw vovnet39a",
    "xception": "legacy_xception",
    "xception_aligned": "xception41p",
    "xcit": "xcit_nano_12_p8_224",
}


def families() -> dict[tuple[str, str], list[str]]:
    """File and name of each family that this timm has -> its models."""
    torchvision_ops.ensure_torchvision()
    library: Any = importlib.import_module("timm")
    found: dict[tuple[str, str], list[str]] = {}
    for file in library.list_modules():
        for name in library.list_models(module=file):
            if not name.startswith("test_"):
                found.setdefault((file, family(name)), []).append(name)
    return found


def family(name: str) -> str:
    """What a name has before its first figure: ``resnet`` of ``resnet10t``."""
    begins = re.match(r"(tf_|legacy_)?[a-z]+", name)
    assert begins is not None
    return begins[0]


def cases() -> Iterator[Case]:
    """One for each."""
    for file, smallest in SMALLEST.items():
        for name in smallest.split():
            yield Case(SECTION, file, name, partial(build, name))


def build(name: str) -> Sample:
    """A model by name, with random weights."""
    reference = timm_models.TIMM + name
    torch.manual_seed(0)
    model = random_weights.randomize(references.resolve(reference)())
    return Sample(model, ((timm_models.example_inputs(model, reference), {}),))


def main() -> None:
    """Prints the smallest of each family."""
    library: Any = importlib.import_module("timm")
    found: dict[str, list[str]] = {}
    for (file, _), names in families().items():
        sizes = {}
        for name in names:
            with torch.device("meta"):
                sizes[name] = sum(weight.numel() for weight in library.create_model(name).parameters())
        found.setdefault(file, []).append(min(sizes, key=lambda name: (sizes[name], name)))
    for file, smallest in found.items():
        print(f'    "{file}": "{" ".join(smallest)}",')


if __name__ == "__main__":
    main()
