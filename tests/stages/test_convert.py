"""A run folder to a Hugging Face directory and back, and models loaded from either."""

import importlib.util
import io
import json
import shutil
from dataclasses import asdict

import pytest
import safetensors
import torch

from nanotrain import checkpoint
from nanotrain.__main__ import main
from nanotrain.hf_tokenizer import load_hf_tokenizer
from nanotrain.model.transformer import ModelConfig
from nanotrain.pretrained import load_pretrained
from nanotrain.stages import convert
from tests.conftest import TINY
from tests.model.test_hf import equal
from tests.model.test_transformer import logits

extras = pytest.mark.extras
peers = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("transformers", "tokenizers"))), reason="extra: pip install -e '.[hf,peers]' to load with transformers"
)
TEXT = "def main():\n\treturn  'caf\u00e9 \u4e16' # <eos> 12\n"


def convert_to(*arguments):
    assert convert.main([f"--{a}" for a in arguments]) == 0


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    """A run of two steps in bfloat16."""
    folder = tmp_path_factory.mktemp("run") / "run"
    tiny = [flag for flag in TINY if "dtype" not in flag]
    assert main(["pretrain", f"--data.dir={data}", f"--run.dir={folder}", *tiny, "--train.steps=2", "--train.val_tokens=200"]) == 0
    return folder


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported") / "hf"
    convert_to(f"source={run}", f"to={folder}")
    return folder


def load(folder, **options):
    said = []
    model, tokenizer = load_pretrained(folder, **(dict(device="cpu", say=said.append) | options))
    assert not said
    return model, tokenizer


def test_a_run_becomes_a_directory_of_hugging_face(run, exported, tmp_path, capsys):
    convert_to(f"source={run}", f"to={tmp_path / 'again'}")
    assert "a Hugging Face directory of the family qwen3\n" in capsys.readouterr().out
    assert (tmp_path / "again/model.safetensors").read_bytes() == (exported / "model.safetensors").read_bytes()
    (model, tokenizer), (back, back_tokenizer) = load(run), load(exported)
    assert model.embed.weight.dtype == torch.bfloat16 and equal(model.named_parameters(), back.named_parameters())
    stored = checkpoint.latest(run / "checkpoints", print) / "model.safetensors"
    with safetensors.safe_open(stored, "pt") as file:
        assert all(torch.equal(file.get_tensor(n), p) for n, p in model.named_parameters())
    assert back_tokenizer.fingerprint() == tokenizer.fingerprint() and back_tokenizer.encode(TEXT) == tokenizer.encode(TEXT)
    content = json.loads((exported / "config.json").read_text())
    assert (content["model_type"], content["dtype"]) == ("qwen3", "bfloat16")
    ids = tuple(content[f"{role}_token_id"] for role in ("bos", "eos", "pad"))
    assert ids == (tokenizer.bos, tokenizer.eos, tokenizer.pad)
    assert json.loads((exported / "generation_config.json").read_text())["eos_token_id"] == sorted(tokenizer.stop_ids)


@extras
@peers
def test_transformers_gives_the_same_tokens_and_logits(run, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    convert_to(f"source={run}", f"to={tmp_path / 'hf'}", "dtype=float32", "shard_bytes=50000")
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 2
    model, tokenizer = load(run, dtype=torch.float32)
    theirs, their_tokenizer = AutoModelForCausalLM.from_pretrained(tmp_path / "hf"), AutoTokenizer.from_pretrained(tmp_path / "hf")
    ids = their_tokenizer(TEXT, split_special_tokens=True)["input_ids"]
    assert ids == [tokenizer.bos, *tokenizer.encode(TEXT)] and theirs.dtype == torch.float32
    tokens = torch.tensor([ids])
    with torch.no_grad():
        torch.testing.assert_close(logits(model, tokens), theirs(tokens).logits, rtol=0, atol=1e-4)
    assert theirs.generation_config.eos_token_id == sorted(tokenizer.stop_ids)


@extras
@peers
@pytest.mark.parametrize("option", ["plain", "window", "qkv_bias", "qk_norm", "gemma2", "gpt2"])
def test_our_tokenizer_is_the_same_in_every_family(option, run, tmp_path):
    """AutoTokenizer goes by the model's family too: of a qwen2 it would make Qwen's own tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from nanotrain.hf_tokenizer import save_hf_tokenizer
    from nanotrain.model.hf import save_hf
    from tests.model.test_hf import OURS, build

    tokenizer = load_hf_tokenizer(run)
    family, options = OURS[option]
    save_hf(build(**options, vocab_size=tokenizer.vocab_size + 88), tmp_path, tokenizer=tokenizer)
    before = json.loads((tmp_path / "generation_config.json").read_text())
    save_hf_tokenizer(tokenizer, tmp_path)
    assert json.loads((tmp_path / "generation_config.json").read_text()) == before
    theirs, their_tokenizer = AutoModelForCausalLM.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert theirs.config.model_type == family and theirs.generation_config.eos_token_id == sorted(tokenizer.stop_ids)
    for text in (TEXT, "e\u0301  x\r\n 1234"):
        ids = their_tokenizer(text, split_special_tokens=True).input_ids
        assert ids == [tokenizer.bos, *tokenizer.encode(text)] and their_tokenizer.decode(ids, skip_special_tokens=True) == text


def test_a_directory_of_hugging_face_becomes_a_run(run, exported, data, tmp_path, capsys):
    imported = tmp_path / "imported"
    convert_to(f"source={exported}", f"to={imported}")
    printed = capsys.readouterr().out
    model, tokenizer = load(imported)
    assert f"{sum(p.numel() for p in model.parameters()):,} parameters in bfloat16" in printed
    assert "checkpoints/step-00000000/model.safetensors" in printed
    assert equal(load(run)[0].named_parameters(), model.named_parameters())
    assert [p.name for p in checkpoint.directories(imported / "checkpoints")] == ["step-00000000"]
    checkpoint.verify(imported / "checkpoints/step-00000000")
    state = checkpoint.load_state(imported / "checkpoints/step-00000000")
    assert state["step"] == 0 and state["converted_from"] == str(exported) and state["tokenizer_sha256"] == tokenizer.fingerprint()
    # Training cannot go on from it, for it has no optimizer: one line, nothing changed.
    before = (imported / "tokenizer.model").read_bytes()
    assert main(["pretrain", f"--data.dir={data}", f"--run.dir={imported}", *TINY, "--train.steps=3", "--resume", "auto"]) == 2
    assert capsys.readouterr().err.count("\n") == 1 and (imported / "tokenizer.model").read_bytes() == before


def test_the_same_form_in_another_dtype(run, exported, tmp_path):
    convert_to(f"source={run}", f"to={tmp_path / 'run'}", "format=run", "dtype=float16")
    convert_to(f"source={exported}", f"to={tmp_path / 'hf'}", "format=hf", "dtype=float64")
    want = dict(load(run)[0].named_parameters())
    assert equal(load(tmp_path / "run")[0].named_parameters(), {n: p.half() for n, p in want.items()})
    assert equal(load(tmp_path / "hf")[0].named_parameters(), {n: p.double() for n, p in want.items()})
    assert equal(load(tmp_path / "hf", dtype=torch.bfloat16)[0].named_parameters(), want)


@extras
@peers
def test_a_foreign_model_keeps_its_tokenizer(tmp_path, monkeypatch, capsys):
    import tokenizers
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    from tests.model.test_hf import THEIRS, theirs_of

    vocabulary = {piece: n for n, piece in enumerate(["<s>", "</s>", "<unk>", *"abcdefghij"])}
    core = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary | {"ab": 13}, [("a", "b")], unk_token="<unk>"))
    their_tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    their_tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    theirs = theirs_of(*THEIRS["gemma2"])
    for part in (theirs, their_tokenizer):
        part.save_pretrained(tmp_path / "theirs")
    convert_to(f"source={tmp_path / 'theirs'}", f"to={tmp_path / 'run'}")
    convert_to(f"source={tmp_path / 'run'}", f"to={tmp_path / 'back'}")
    assert main(["sample", str(tmp_path / "run"), "--prompt=abc", "--sampling.max_tokens=3"]) == 0 and "abc" in capsys.readouterr().out
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"abc\n")))
    assert main(["chat", str(tmp_path / "back"), "--sampling.max_tokens=3"]) == 0
    model, tokenizer = load(tmp_path / "run")
    assert equal(model.named_parameters(), load(tmp_path / "theirs")[0].named_parameters())
    ids = AutoTokenizer.from_pretrained(tmp_path / "back")("abcjab")["input_ids"]
    assert tokenizer.encode("abcjab") == ids == [13, 5, 12, 13]
    assert (tmp_path / "back/tokenizer.json").read_bytes() == (tmp_path / "theirs/tokenizer.json").read_bytes()
    tokens = torch.tensor([ids * 5])
    with torch.no_grad():
        torch.testing.assert_close(logits(load(tmp_path / "back")[0], tokens), theirs(tokens).logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "arguments,message",
    [
        ([], "--to: name the directory to write"),
        (["source=nowhere", "to={out}"], "nowhere: no such directory; train a model first, or fetch one, as with `hf download NAME"),
        (["source={run}/checkpoints", "to={out}"], "neither a run folder (no checkpoints/) nor a Hugging Face directory (no config.json)"),
        (["source={run}", "to={run}"], "exists and is not an empty directory"),
        (["source={run}", "to={out}", "dtype=int8"], "--dtype: 'int8' is not {stored,"),
        (["source={run}", "to={out}", "shard_bytes=0"], "--shard_bytes 0: must be at least 1"),
    ],
)
def test_mistakes_are_one_line_and_write_nothing(arguments, message, run, tmp_path):
    before = sorted(run.rglob("*"))
    with pytest.raises(ValueError) as caught:
        convert_to(*(a.format(run=run, out=tmp_path / "out") for a in arguments))
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir()) and sorted(run.rglob("*")) == before


def test_what_cannot_be_exported_leaves_nothing(run, tmp_path):
    state = checkpoint.load_state(checkpoint.latest(run / "checkpoints", print))
    copy = saved_with(run, tmp_path, model=state["model"] | {"positions": "alibi"})
    with pytest.raises(ValueError, match=r"--model\.positions=alibi"):
        convert_to(f"source={copy}", f"to={tmp_path / 'out'}")
    assert [p.name for p in tmp_path.iterdir()] == ["copy"]


def saved_with(run, tmp_path, **changed):
    """A copy of the run whose one checkpoint has another state."""
    newest = checkpoint.latest(run / "checkpoints", print)
    state, tensors = checkpoint.load_state(newest), {n: p.detach() for n, p in load(run)[0].named_parameters()}
    copy = tmp_path / "copy"
    checkpoint.save(copy / "checkpoints", 1, {"model": tensors}, state | changed)
    shutil.copy(run / "tokenizer.model", copy)
    return copy


def test_an_older_checkpoint_lacks_newer_keys_and_a_newer_one_says_so(run, tmp_path):
    state = checkpoint.load_state(checkpoint.latest(run / "checkpoints", print))
    new = {"window_pattern", "norm_offset", "attention_bias", "output_bias", "mlp_bias", "rope_short_factors", "attention_scale"}
    copy = saved_with(run, tmp_path, model={k: v for k, v in state["model"].items() if k not in new})
    model, _ = load(copy)
    assert equal(load(run)[0].named_parameters(), model.named_parameters()) and json.loads(json.dumps(asdict(model.c))) == state["model"]
    copy = saved_with(run, tmp_path, model=state["model"] | {"teleport": 1})
    with pytest.raises(ValueError, match="state.json: model option teleport is unknown; the checkpoint is of a newer nanotrain"):
        load_pretrained(copy, device="cpu")
    copy = saved_with(run, tmp_path, model=state["model"] | {"ffn_width": 64})
    with pytest.raises(ValueError, match=r"tensor 'blocks\.0\.mlp\.gate_proj\.weight' is missing, unknown or of another shape"):
        load_pretrained(copy, device="cpu")
    copy = saved_with(run, tmp_path, tokenizer_sha256="0" * 64)
    with pytest.raises(ValueError, match="the tokenizer's fingerprint is .{12}, step-00000001 has 000000000000"):
        load_pretrained(copy, device="cpu")
    assert set(state["model"]) == set(ModelConfig.__dataclass_fields__)


def test_a_damaged_checkpoint_is_passed_over_loudly(run, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    newest = checkpoint.latest(copy / "checkpoints", print)
    shutil.copytree(newest, newest.with_name("step-00000009"))
    (newest.with_name("step-00000009") / "model.safetensors").write_bytes(b"x")
    said = []
    model, _ = load_pretrained(copy, device="cpu", say=said.append)
    assert equal(load(run)[0].named_parameters(), model.named_parameters()) and "step-00000009/model.safetensors" in said[0]
    shutil.rmtree(newest)
    with pytest.raises(ValueError, match="checkpoints: no checkpoint that verifies"):
        load_pretrained(copy, device="cpu", say=said.append)


def test_a_tokenizer_larger_than_the_model_is_told(exported, tmp_path):
    from nanotrain.hf_tokenizer import save_hf_tokenizer
    from nanotrain.model.hf import save_hf
    from tests.model.test_hf import build

    save_hf(build(), tmp_path / "hf")
    save_hf_tokenizer(load_hf_tokenizer(exported), tmp_path / "hf")
    said = []
    load_pretrained(tmp_path / "hf", device="cpu", say=said.append)
    assert "the tokenizer has 512 tokens, the model only 50" in said[0]
