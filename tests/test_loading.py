"""Models from folders, from a hub that runs here, and what becomes of the action tokens' rows."""

from __future__ import annotations

import json
import logging.handlers
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from hashlib import sha1
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlavaOnevisionForConditionalGeneration, conversion_mapping

from convert.action_codec import action_tokens
from convert.prompt import question
from oxe_mix.errors import UserError
from tests import test_original_layout as original
from train_llava.action_tokens import add_action_tokens, rows_of
from train_llava.config import ModelConfig, TinyModel
from train_llava.loading import find_folder, load_checkpoint, load_or_build, read_shapes, save_checkpoint
from train_llava.model import OneViewLlava
from train_llava.original_layout import Form, load_original
from train_llava.processor import OneViewProcessor
from train_llava.tiny import build_tiny

QUESTION = question("pick up the red block")
TINY = TinyModel(hidden_size=32, heads=2, text_layers=2)
# As in checkpoints that transformers 4 wrote, the published ones among them.
OLD_NAMES = (
    ("model.language_model.", "language_model.model."),
    ("lm_head.", "language_model.lm_head."),
    ("model.vision_tower.", "vision_tower.vision_model."),
    ("model.multi_modal_projector.", "multi_modal_projector."),
    ("model.image_newline", "image_newline"),
)
COMMIT = "c" * 40


def _tiny(tied: bool = False) -> tuple[OneViewLlava, OneViewProcessor]:
    torch.manual_seed(0)
    model, processor = build_tiny(TINY, [QUESTION])
    if tied:
        text: Any = model.config.text_config
        model.config.tie_word_embeddings = text.tie_word_embeddings = True
        model.tie_weights()
    return model.eval(), processor


def _weights(model: OneViewLlava) -> dict[str, Tensor]:
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del weights["lm_head.weight"]
    return weights


def _old_name(name: str) -> str:
    for new, old in OLD_NAMES:
        if name.startswith(new):
            return old + name.removeprefix(new)
    raise AssertionError(name)


def _edit(folder: Path, **fields: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))


@pytest.fixture(autouse=True)
def _as_in_a_new_process() -> None:
    """What the library has been told of our class is forgotten: a test loads first, another saves first."""
    conversion_mapping.USER_REGISTERED_MAPPINGS.discard("OneViewLlava")
    told: Any = conversion_mapping._checkpoint_conversion_mapping_cache or {}
    told.pop("OneViewLlava", None)


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def stock(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in transformers' layout with the old names, without action tokens."""
    folder = tmp_path_factory.mktemp("stock")
    model, processor = _tiny(request.param)
    save_checkpoint(folder, model, processor)
    save_file(
        {_old_name(n): w for n, w in _weights(model).items()}, folder / "model.safetensors", {"format": "pt"}
    )
    return folder


def _logits(model: OneViewLlava, ids: list[int], side: int = 64) -> Tensor:
    pixels = torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits: Tensor = model.eval()(torch.tensor([ids]), pixels.to(model.dtype)).logits
    return logits


def test_the_names_of_published_checkpoints_are_read_and_the_stock_class_names_are_written(
    stock: Path, tmp_path: Path
) -> None:
    source, processor = _tiny(read_shapes(str(stock)).tie_word_embeddings)
    model, _ = load_checkpoint(stock)
    ids = processor.prompt_ids(QUESTION, [17])
    assert torch.equal(_logits(model, ids), _logits(source, ids))
    tied = source.config.tie_word_embeddings
    assert (model.lm_head.weight is rows_of(model.get_input_embeddings())) == tied
    save_checkpoint(tmp_path / "ours", model, processor)
    LlavaOnevisionForConditionalGeneration.from_pretrained(stock).save_pretrained(tmp_path / "theirs")
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("ours", "theirs"))
    assert ours.keys() == theirs.keys()
    assert ("language_model.lm_head.weight" in ours) == (not tied)
    again, _ = load_checkpoint(tmp_path / "ours")
    assert torch.equal(_logits(again, ids), _logits(source, ids))
    assert (again.lm_head.weight is rows_of(again.get_input_embeddings())) == tied


def test_gathered_weights_are_saved_in_place_of_the_models_own(tmp_path: Path) -> None:
    for tied in (False, True):
        model, processor = _tiny(tied)
        gathered = {name: weight.clone() for name, weight in model.state_dict().items()}
        ids = processor.prompt_ids(QUESTION, [17])
        before = _logits(model, ids)
        if tied:
            gathered["lm_head.weight"] = gathered["model.language_model.embed_tokens.weight"]
        for weight in model.parameters():
            weight.data.zero_()
        save_checkpoint(tmp_path / str(tied), model, processor, gathered)
        stored = load_file(tmp_path / str(tied) / "model.safetensors")
        assert "language_model.model.embed_tokens.weight" in stored
        assert ("language_model.lm_head.weight" in stored) == (not tied)
        assert torch.equal(_logits(load_checkpoint(tmp_path / str(tied))[0], ids), before)


def _set(name: str, value: Tensor) -> Callable[[dict[str, Tensor]], object]:
    return lambda weights: weights.update({name: value})


MISFITS: list[tuple[bool, Callable[[dict[str, Tensor]], object], str]] = [
    (
        False,
        lambda weights: weights.pop("language_model.model.layers.1.mlp.up_proj.weight"),
        r"missing \['model.language_model.layers.1.mlp.up_proj.weight'\], unexpected \[\]",
    ),
    (False, _set("language_model.spare", torch.ones(1)), r"missing \[\], unexpected \['.*spare'\]"),
    (
        False,
        _set("language_model.model.norm.weight", torch.ones(7)),
        r"norm.weight is \[7\], but \[32\] by config.json",
    ),
    (
        False,
        lambda weights: weights.pop("language_model.lm_head.weight"),
        "the weights have no lm_head.weight; if it is tied, as in Qwen2-0.5B, set tie_word_embeddings",
    ),
    (
        True,
        lambda weights: weights.update(
            {"language_model.lm_head.weight": weights["language_model.model.embed_tokens.weight"] + 1}
        ),
        "lm_head.weight is not the embedding, though tie_word_embeddings is true",
    ),
]


@pytest.mark.parametrize(("tied", "edit", "message"), MISFITS)
def test_weights_that_do_not_fit_are_refused_in_one_line(
    tmp_path: Path,
    tied: bool,
    edit: Callable[[dict[str, Tensor]], object],
    message: str,
) -> None:
    model, processor = _tiny(tied)
    save_checkpoint(tmp_path, model, processor)
    weights = {_old_name(n): w for n, w in _weights(model).items()}
    edit(weights)
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    said = logging.handlers.BufferingHandler(1000)
    logging.getLogger("transformers").addHandler(said)
    with pytest.raises(UserError, match=message) as error:
        load_checkpoint(tmp_path)
    logging.getLogger("transformers").removeHandler(said)
    assert "\n" not in str(error.value)
    assert not said.buffer  # the library's own table would bury the line


def test_a_stored_head_that_is_the_embedding_is_tied(tmp_path: Path) -> None:
    model, processor = _tiny(tied=True)
    save_checkpoint(tmp_path, model, processor)
    weights = _weights(model)
    weights["lm_head.weight"] = weights["model.language_model.embed_tokens.weight"].clone()
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    loaded, _ = load_checkpoint(tmp_path)
    assert loaded.lm_head.weight is rows_of(loaded.get_input_embeddings())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_weights_have_the_runs_precision_and_kernel_in_either_layout(
    stock: Path, tmp_path: Path, precision: Any
) -> None:
    other = original._write(tmp_path / "original", original._source(True, original.SPARE_ROWS))
    for config in (
        ModelConfig(path=str(stock), attention="eager", image_mode="pad"),
        ModelConfig(path=str(other), attention="eager", image_mode="pad"),
        ModelConfig(tiny=TINY, attention="eager", image_mode="pad"),
    ):
        model, processor, _ = load_or_build(config, [QUESTION], 0, precision)
        assert {w.dtype for w in model.parameters()} == {
            torch.bfloat16 if precision == "bf16" else torch.float32
        }
        assert model.model.vision_tower.config._attn_implementation == "eager"
        assert model.model.language_model.config._attn_implementation == "eager"
        assert processor.image_mode == "pad"
    assert load_checkpoint(stock, torch.bfloat16)[0].dtype == torch.bfloat16
    assert load_original(other)[0].dtype == torch.float32
    exact, _ = load_original(other)
    half, _ = load_original(other, Form(torch.bfloat16))
    for name, weight in exact.state_dict().items():
        assert torch.equal(half.state_dict()[name], weight.bfloat16())


def test_flash_attention_needs_its_package_and_half_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    from train_llava import loading

    flash = ModelConfig(tiny=TINY, attention="flash_attention_2")
    with pytest.raises(UserError, match="needs flash-attn, which is not installed; take sdpa"):
        load_or_build(flash, [QUESTION], 0, "bf16")
    monkeypatch.setattr(loading, "find_spec", lambda name: name)
    with pytest.raises(UserError, match="flash_attention_2 knows no fp32; take sdpa, or train in bf16"):
        load_or_build(flash, [QUESTION], 0, "fp32")


@pytest.mark.parametrize("tied", [False, True])
def test_spare_rows_are_begun_at_the_mean_of_the_rows_that_have_a_token(tmp_path: Path, tied: bool) -> None:
    source = original._source(
        tied, rows=600
    )  # 272 tokens with <image> and <video>, 256 new ones, 72 to spare
    for table in (rows_of(source.get_input_embeddings()), rows_of(source.get_output_embeddings())):
        table.data[272:] = 1e4  # what no token has is no part of the mean, and does not stay
    config = ModelConfig(path=str(original._write(tmp_path / "original", source)))
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        model, processor, report = load_or_build(config, [], 0, precision)  # type: ignore[arg-type]
        assert report.ids == tuple(range(272, 528))
        assert str(report) == (
            "256 action tokens: ids 272 to 527, new rows of input and output embedding at the mean of the "
            f"old ones, head {'tied' if tied else 'not tied'}"
        )
        for layer, of in (
            (model.get_input_embeddings(), source.get_input_embeddings()),
            (model.get_output_embeddings(), source.get_output_embeddings()),
        ):
            table, old = rows_of(layer), rows_of(of)[:272].detach().to(dtype)
            assert len(table) == 600
            assert torch.equal(table[:272], old)
            assert torch.allclose(
                table[272:528].float(), old.float().mean(dim=0).to(dtype).float(), atol=1e-6
            )
            assert (table[528:] == 1e4).all()
    # A run that goes on: what was learnt for the tokens stays.
    rows_of(model.get_input_embeddings()).data[300] = 7
    save_checkpoint(tmp_path / "run", model, processor)
    again, _, report = load_or_build(ModelConfig(path=str(tmp_path / "run")), [], 0, "bf16")
    assert (rows_of(again.get_input_embeddings())[300] == 7).all()
    assert torch.equal(rows_of(again.get_output_embeddings()), rows_of(model.get_output_embeddings()))
    head = "tied" if tied else "not tied"
    assert str(report) == (
        f"256 action tokens: ids 272 to 527, in the checkpoint already, their rows kept, head {head}"
    )


def test_tables_that_are_too_short_grow_and_a_tied_head_stays_tied(stock: Path) -> None:
    model, processor, report = load_or_build(ModelConfig(path=str(stock)), [], 0)
    old = len(processor.tokenizer) - 256
    assert report.ids == tuple(range(old, old + 256))
    assert len(rows_of(model.get_input_embeddings())) == len(rows_of(model.lm_head)) == old + 256
    assert report.is_tied == read_shapes(str(stock)).tie_word_embeddings
    assert (model.lm_head.weight is rows_of(model.get_input_embeddings())) == report.is_tied


def test_a_tokenizer_with_some_of_the_tokens_gets_the_others(tmp_path: Path) -> None:
    model, processor = _tiny()
    processor.tokenizer.add_tokens(action_tokens()[:200], special_tokens=True)
    model.resize_token_embeddings(len(processor.tokenizer), mean_resizing=False)
    learnt = rows_of(model.get_input_embeddings())[-1].detach().clone()
    report = add_action_tokens(model, processor.tokenizer)
    assert report.num_new == 56
    assert torch.equal(rows_of(model.get_input_embeddings())[report.ids[199]], learnt)
    assert ", 56 new rows of input and output embedding" in str(report)


def test_the_processor_of_a_published_checkpoint_is_taken_as_it_is(stock: Path, tmp_path: Path) -> None:
    """The files of transformers 4: the processor in two of them, beside one for videos."""
    folder = tmp_path / "published"
    shutil.copytree(stock, folder)
    images = json.loads((folder / "processor_config.json").read_text())["image_processor"]
    images |= {"image_processor_type": "LlavaOnevisionImageProcessor", "image_mean": [0.4] * 3}
    (folder / "preprocessor_config.json").write_text(json.dumps(images))
    (folder / "video_preprocessor_config.json").write_text("{}")
    (folder / "processor_config.json").write_text(
        json.dumps(
            {
                "processor_class": "LlavaOnevisionProcessor",
                "num_image_tokens": 16,
                "image_token": "<image>",
                "video_token": "<video>",
                "vision_feature_select_strategy": "full",
            }
        )
    )
    template = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").unlink()
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    _, processor, _ = load_or_build(ModelConfig(path=str(folder)), [], 0)
    assert processor.num_view_tokens((64, 64)) == 17
    assert list(processor.image_processor.image_mean) == [0.4] * 3
    assert processor.image_mode == "single"
    assert processor.prompt_ids(QUESTION, [17]) == _tiny()[1].prompt_ids(QUESTION, [17])


def test_code_that_a_checkpoint_brings_along_is_never_run(stock: Path, tmp_path: Path) -> None:
    folder, ran = tmp_path / "with-code", tmp_path / "ran"
    shutil.copytree(stock, folder)
    (folder / "evil.py").write_text(f"open({str(ran)!r}, 'w')\nclass Evil: pass\n")
    _edit(folder, auto_map={"AutoModel": "evil.Evil", "AutoConfig": "evil.Evil"})
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    tokenizer["auto_map"] = {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    load_checkpoint(folder)
    assert not ran.exists()


def test_what_is_no_whole_model_is_refused_in_one_line(stock: Path, tmp_path: Path) -> None:
    def refused(path: Path | str, message: str) -> None:
        with pytest.raises(UserError, match=message) as error:
            load_or_build(ModelConfig(path=str(path)), [], 0)
        assert "\n" not in str(error.value)

    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "no config.json, so no model")
    folder = tmp_path / "folder"
    shutil.copytree(stock, folder)
    _edit(folder, model_type="llava")
    refused(folder, r"config\.json: model_type is llava, not llava_onevision")
    (folder / "config.json").write_text("{")
    refused(folder, r"config\.json: cannot be read")
    shutil.copy(stock / "config.json", folder)
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    refused(folder, "no LLaVA-OneVision that can be loaded")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    refused(folder, r"the weights are pickled \(\.bin\), and reading those can run code")
    (folder / "adapter_config.json").write_text("{}")
    refused(folder, "holds adapters, not a whole model; make one of them with oxe-mix export")
    refused(folder / "config.json", "is a file; give the folder of a model")
    with pytest.raises(UserError, match="no such folder; give the one that training wrote"):
        load_checkpoint(tmp_path / "nowhere")


@dataclass
class Hub:
    """A hub with one model: enough of its protocol for its own client."""

    folder: Path
    url: str = ""
    asked: list[str] = field(default_factory=list)
    refusal: tuple[int, str] | None = None  # a status, and the hub's own code for it

    def answer(self, path: str) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and content."""
        self.asked.append(path)
        if self.refusal is not None:
            return self.refusal[0], {"X-Error-Code": self.refusal[1]}, b"{}"
        path = path.partition("?")[0]
        if path == "/api/models/lab/model/revision/main":
            return 200, {}, json.dumps({"id": "lab/model", "sha": COMMIT}).encode()
        if path == f"/api/models/lab/model/tree/{COMMIT}":
            files = [
                {
                    "type": "file",
                    "path": f.name,
                    "size": f.stat().st_size,
                    "oid": sha1(f.read_bytes()).hexdigest(),
                }
                for f in self.folder.iterdir()
            ]
            return 200, {}, json.dumps(files).encode()
        file = self.folder / path.rsplit("/", 1)[-1]
        if path.startswith("/lab/model/resolve/") and file.exists():
            content = file.read_bytes()
            etag = f'"{sha1(content).hexdigest()}"'
            return 200, {"ETag": etag, "X-Repo-Commit": COMMIT}, content
        return 404, {"X-Error-Code": "RepoNotFound"}, b"{}"


@pytest.fixture
def hub(stock: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    found = Hub(stock)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, headers, content = found.answer(self.path)
            self.send_response(status)
            for name, value in {"Content-Length": str(len(content)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        do_HEAD = do_GET  # noqa: N815

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    found.url = f"http://127.0.0.1:{server.server_port}"
    _point_at(found.url, tmp_path, monkeypatch)
    yield found
    server.shutdown()
    server.server_close()
    thread.join()


def _point_at(url: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "ENDPOINT", url)
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)


@pytest.mark.parametrize("path", ["./gone", "../gone/x", "/gone/x", "~/gone/x", "runs/today/gone"])
def test_what_looks_like_a_path_is_not_asked_of_the_hub(hub: Hub, path: str) -> None:
    with pytest.raises(UserError, match=f"^{re.escape(path)}: no such folder; give the folder of a model"):
        find_folder(path)
    assert not hub.asked


def test_a_model_on_the_hub_is_fetched_once_without_pickles_and_code(hub: Hub, tmp_path: Path) -> None:
    more = tmp_path / "more"
    shutil.copytree(hub.folder, more)
    for name in ("pytorch_model.bin", "modeling.py", "weights.pt", "README.md"):
        (more / name).write_text("no")
    hub.folder = more
    model, processor, _ = load_or_build(ModelConfig(path="lab/model"), [], 0)
    ids = processor.prompt_ids(QUESTION, [17])
    base, _, _ = load_or_build(ModelConfig(path=str(more)), [], 0)
    assert torch.equal(_logits(model, ids), _logits(base, ids))
    fetched = {path.rsplit("/", 1)[-1] for path in hub.asked if "/resolve/" in path}
    assert "model.safetensors" in fetched
    assert not fetched & {"pytorch_model.bin", "modeling.py", "weights.pt", "README.md"}
    before = len(hub.asked)
    find_folder("lab/model")
    assert not [path for path in hub.asked[before:] if "/resolve/" in path]


def test_a_model_in_the_authors_layout_comes_from_the_hub_too(hub: Hub, tmp_path: Path) -> None:
    hub.folder = original._write(tmp_path / "original", original._source(True, original.SPARE_ROWS))
    model, processor, report = load_or_build(ModelConfig(path="lab/model"), [], 0)
    assert report.is_tied
    source = original._source(True, original.SPARE_ROWS)
    ids = processor.prompt_ids(QUESTION, [5])
    assert torch.equal(_logits(model, ids, 28)[..., :270], _logits(source, ids, 28)[..., :270])


@pytest.mark.parametrize(
    ("path", "refusal", "message"),
    [
        (
            "lab/other",
            None,
            "no such folder, and no such model on the hub; if it is private there: hf auth login",
        ),
        ("lab/model", (403, "GatedRepo"), "gated on the hub; accept its terms there, then: hf auth login"),
        ("lab/model", (500, ""), "the hub cannot be reached"),
        ("lab model", None, r"neither a folder nor an id on the hub \(OWNER/NAME\)"),
    ],
)
def test_what_the_hub_refuses_is_one_line(
    hub: Hub, path: str, refusal: tuple[int, str] | None, message: str
) -> None:
    hub.refusal = refusal
    with pytest.raises(UserError, match=f"^{path}: .*{message}") as error:
        find_folder(path)
    assert "\n" not in str(error.value)


def test_without_a_network_the_error_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _point_at("http://127.0.0.1:9", tmp_path, monkeypatch)
    with pytest.raises(
        UserError, match=r"the hub cannot be reached .*; fetch the model elsewhere, and give its"
    ) as e:
        find_folder("lab/model")
    assert "\n" not in str(e.value)
