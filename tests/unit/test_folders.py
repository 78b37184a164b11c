"""Hugging Face folders, shards, timm's names: what they are made into, and what is said where that can't be."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import armopt
from armopt.cli.app import app
from armopt.errors import InputError
from armopt.models import huggingface, references
from armopt.models.torchvision_ops import ensure_torchvision

SMALL = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
pytestmark = pytest.mark.filterwarnings("ignore::armopt.ArmoptWarning")


@pytest.fixture(scope="module")
def transformers() -> Any:
    ensure_torchvision()
    return pytest.importorskip("transformers")


def bert(transformers: Any) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.BertConfig(**SMALL, vocab_size=100, max_position_embeddings=64)
    model: nn.Module = transformers.BertForSequenceClassification(config).eval()
    return model


def run(*asked: str) -> Any:
    return CliRunner().invoke(app, list(asked))


def test_a_text_model_takes_ids_and_a_mask_of_any_length(tmp_path: Path, transformers: Any) -> None:
    model: Any = bert(transformers)
    model.save_pretrained(tmp_path / "m")
    asked = ["--at", "tokens=8,32", "--batch", "1,2", "-o", str(tmp_path / "b")]
    done = run("optimize", str(tmp_path / "m"), *asked)
    assert done.exit_code == 0, done.output
    assert "at batch 2, tokens 32" in done.output
    loaded = armopt.load(tmp_path / "b")
    for rows, tokens in ((1, 5), (3, 64)):
        given = {"input_ids": torch.randint(0, 100, (rows, tokens)), "attention_mask": torch.ones(rows, tokens).long()}
        torch.testing.assert_close(loaded(**given).logits, model(**given).logits, atol=2e-3, rtol=0)
    with pytest.raises(InputError, match="dimension 1 is 65, the model takes up to 64"):
        loaded(input_ids=torch.ones(1, 65).long(), attention_mask=torch.ones(1, 65).long())
    with pytest.raises(InputError, match=r"whose config\.json says what model it is\. Leave out --model x:y"):
        raise run("plan", str(tmp_path / "m"), "--model", "x:y").exception


def test_a_decoder_in_bf16_has_no_cache_and_a_vision_model_its_size(tmp_path: Path, transformers: Any) -> None:
    config = transformers.LlamaConfig(**SMALL, vocab_size=100, max_position_embeddings=64)
    transformers.LlamaForCausalLM(config).bfloat16().save_pretrained(tmp_path / "m", max_shard_size="10KB")
    assert (tmp_path / "m" / "model.safetensors.index.json").is_file()
    done = run("plan", "--model", f"hf:{tmp_path / 'm'}", "--at", "tokens=16", "--json")
    assert json.loads(done.stdout)["buckets"][0]["bucket"] == {"tokens": 16}
    vit: Any = transformers.ViTForImageClassification(transformers.ViTConfig(**SMALL, image_size=32, patch_size=8))
    vit.save_pretrained(tmp_path / "v")
    given, varying = huggingface.example_inputs(vit, f"hf:{tmp_path / 'v'}")
    assert ({name: tuple(x.shape) for name, x in given.items()}, varying) == ({"pixel_values": (1, 3, 32, 32)}, [])
    (tmp_path / "v" / "preprocessor_config.json").write_text('{"crop_size": {"height": 24, "width": 16}}')
    given, _ = huggingface.example_inputs(vit, f"hf:{tmp_path / 'v'}")
    assert given["pixel_values"].shape == (1, 3, 24, 16)


def test_sound_and_video_have_examples(transformers: Any) -> None:
    """One second at 16 kHz, a spectrogram, as many frames as the configuration says."""
    decoder = {"decoder_layers": 1, "decoder_attention_heads": 2, "encoder_layers": 1, "encoder_attention_heads": 2}
    sizes = {"d_model": 32, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "vocab_size": 90, "num_mel_bins": 16}
    ends = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    whisper = transformers.WhisperConfig(
        **decoder, **sizes, **ends, max_source_positions=20, max_target_positions=12, suppress_tokens=None
    )
    sound = transformers.Wav2Vec2Config(**SMALL, conv_dim=(8,), conv_kernel=(9,), conv_stride=(5,))
    video = transformers.VideoMAEConfig(**SMALL, image_size=32, patch_size=8, num_frames=4)
    for model, expected in (
        (
            transformers.WhisperForConditionalGeneration(whisper),
            {"input_features": (16, 40), "decoder_input_ids": (4,)},
        ),
        (transformers.Wav2Vec2Model(sound), {"input_values": (16_000,)}),
        (transformers.ASTModel(transformers.ASTConfig(**SMALL, max_length=24)), {"input_values": (24, 128)}),
        (transformers.VideoMAEModel(video), {"pixel_values": (4, 3, 32, 32)}),
    ):
        given, varying = huggingface.example_inputs(model, "hf:none")
        assert {name: tuple(x.shape) for name, x in given.items()} == {n: (1, *shape) for n, shape in expected.items()}
        assert [each.names for each in varying] == [{1: ("decoder_tokens", 12)}] * ("decoder_input_ids" in expected)
    model.main_input_name = "points"
    with pytest.raises(InputError, match=r"main input is points.*--input points=SHAPE"):
        huggingface.example_inputs(model, "hf:none")


def test_an_encoder_decoder_from_python_needs_no_switch(tmp_path: Path, transformers: Any) -> None:
    config = transformers.T5Config(d_model=32, d_kv=16, d_ff=64, num_layers=1, num_heads=2, vocab_size=100)
    model: Any = transformers.T5ForConditionalGeneration(config).eval()
    given = {"input_ids": torch.randint(0, 100, (2, 8)), "decoder_input_ids": torch.randint(0, 100, (2, 4))}
    armopt.optimize(model, given, output=tmp_path / "b").require()
    assert model.config.use_cache
    assert model.decoder.config.use_cache
    found = armopt.load(tmp_path / "b")(**given).logits
    with torch.no_grad():
        torch.testing.assert_close(found, model(**given).logits, atol=2e-2, rtol=0)
    described, varying = huggingface.example_inputs(model, "hf:none")
    assert list(described) == ["input_ids", "attention_mask", "decoder_input_ids"]
    assert [name for each in varying for name, _ in each.names.values()] == ["tokens", "tokens", "decoder_tokens"]


def test_mixtral_is_one_graph_and_kind_module_says_so(tmp_path: Path, transformers: Any) -> None:
    config = transformers.MixtralConfig(**SMALL, num_key_value_heads=2, vocab_size=50, num_local_experts=2)
    model = transformers.MixtralForCausalLM(config).eval()
    ids = torch.randint(0, 50, (2, 8))
    armopt.optimize(model, {"input_ids": ids}, output=tmp_path / "b").require()
    with pytest.raises(InputError, match="the model can be captured whole"):
        armopt.optimize(model, [(ids,)], kind="module", output=tmp_path / "c")


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (None, "holds no config.json. Give a folder that save_pretrained wrote; nothing is downloaded"),
        ("{", "can't be read"),
        ("[]", "is no JSON object"),
        ("{}", "names no class. Save it with save_pretrained"),
        ('{"architectures": ["Mine"], "auto_map": {}}', "names the class 'Mine', which transformers"),
        ('{"architectures": ["logging"]}', "names the class 'logging', which transformers"),
        ('{"architectures": ["BertModel"], "model_type": "bert"}', "transformers can't load it"),
        ('{"text_config": {"_attn_implementation": "someone/kernels"}}', "asks for the kernels 'someone/kernels'"),
        ('{"attn_implementation": {"": "sdpa", "text_config": "a/b@v1"}}', "asks for the kernels 'a/b@v1'"),
        ('{"parts": [{"experts_implementation": ["eager", "paged|a/b:f"]}]}', "asks for the kernels 'paged|a/b:f'"),
        ('{"architectures": ["a/b"], "_name_or_path": "a/b", "implementation": "a/b"}', "names the class 'a/b'"),
    ],
)
def test_what_is_wrong_with_a_folder_is_said(tmp_path: Path, transformers: Any, config: str | None, said: str) -> None:
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    with pytest.raises(InputError) as raised:
        references.resolve(f"hf:{tmp_path}")()
    assert said in str(raised.value)


def test_a_damaged_shard_and_a_missing_folder_are_named(tmp_path: Path, transformers: Any) -> None:
    bert(transformers).save_pretrained(tmp_path, max_shard_size="20KB")
    place = sorted(tmp_path.glob("*.safetensors"))[1]
    place.write_bytes(b"x" * 20)
    with pytest.raises(InputError, match=f"{place.name}: transformers can't load it"):
        references.resolve(f"hf:{tmp_path}")()
    with pytest.raises(InputError, match="nowhere: there is no such folder"):
        references.resolve(f"hf:{tmp_path / 'nowhere'}")()


def test_a_folder_of_pickles_is_not_read(tmp_path: Path, transformers: Any) -> None:
    model: Any = bert(transformers)
    model.config.architectures = ["BertForSequenceClassification"]
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"transformers can't load it.*model\.safetensors"):
        references.resolve(f"hf:{tmp_path}")()


def linear() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 4)).eval()


def shards(folder: Path) -> Path:
    from safetensors.torch import save_file

    state = linear().state_dict()
    placed = {key: f"model-{i % 2}.safetensors" for i, key in enumerate(state)}
    for name in set(placed.values()):
        save_file({key: state[key] for key in state if placed[key] == name}, folder / name)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": placed}))
    return index


def test_a_state_dict_in_several_files(tmp_path: Path) -> None:
    asked = ["--model", "tests.unit.test_folders:linear", "--input", "2x8", "-o", str(tmp_path / "b")]
    done = run("optimize", str(shards(tmp_path)), *asked)
    assert done.exit_code == 0, done.output
    x = torch.randn(2, 8)
    torch.testing.assert_close(armopt.load(tmp_path / "b")(x), linear()(x), atol=2e-2, rtol=0)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "is no JSON. Give the index that save_pretrained wrote"),
        ('{"a": 1}', "is JSON without a weight_map"),
        ('{"weight_map": {"a": "../x.safetensors"}}', "names '../x.safetensors', no .safetensors beside it"),
        ('{"weight_map": {"a": "x.safetensors"}}', "x.safetensors: there is no such file"),
        ('{"weight_map": {"a": "model-0.safetensors"}}', "model-0.safetensors: lacks a"),
        ('{"weight_map": {"a": "cut.safetensors"}}', "cut.safetensors: is truncated or damaged"),
    ],
)
def test_an_index_that_is_none_is_refused(tmp_path: Path, content: str, said: str) -> None:
    index = shards(tmp_path)
    index.write_text(content)
    (tmp_path / "cut.safetensors").write_bytes(b"x" * 20)
    error = run("plan", str(index), "--model", "tests.unit.test_folders:linear", "--input", "2x8").exception
    assert isinstance(error, InputError)
    assert said in str(error)


class Spectral(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.filter = nn.Parameter(torch.randn(16, dtype=torch.complex64))
        self.fc = nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.fc(torch.fft.ifft(torch.fft.fft(x) * self.filter).real)
        return result


def test_complex_parameters_stay_as_they_are(tmp_path: Path) -> None:
    model, x = Spectral().eval(), torch.randn(2, 16)
    armopt.optimize(model, (x,), output=tmp_path / "b").require()
    torch.testing.assert_close(armopt.load(tmp_path / "b")(x), model(x), atol=5e-2, rtol=0)


def test_timm_by_name_where_it_is_installed() -> None:
    if importlib.util.find_spec("timm") is None:
        with pytest.raises(InputError, match=r"needs timm, which is not installed\. pip install timm"):
            references.resolve("timm:resnet10t")
        return
    with pytest.raises(InputError, match=r"unknown timm model 'resnet10'\. Did you mean .*resnet10t"):
        references.resolve("timm:resnet10")
    assert run("plan", "--model", "timm:resnet10t").exit_code == 0
