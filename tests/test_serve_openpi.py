"""The real openpi-client, in an environment of its own, and what docs/serve.md says of it and the command."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from typer.main import get_command

from convert.prompt import Asking
from oxe_mix.cli import app
from tests.conftest import ROOT, run
from tests.serving import FRAME, Command, command, tiny_policy, write_checkpoint
from train_llava.acting.arrays import DTYPES
from train_llava.acting.incoming import Caps
from train_llava.acting.obs_keys import obs_keys
from train_llava.acting.observation import Observation

CLIENT = ("openpi-client==0.1.2", "typing_extensions==4.16.0")
TOKEN = "0123456789abcdef"
PAGE = (ROOT / "docs/serve.md").read_text()
# Sends what stock clients send, and prints what their own library makes of the answers.
TALK = """
import json, sys
import numpy as np
from openpi_client.websocket_client_policy import WebsocketClientPolicy
frame = np.load(sys.argv[2])
policy = WebsocketClientPolicy("127.0.0.1", int(sys.argv[1]), api_key=sys.argv[3])
asked = {"observation/image": frame, "observation/wrist_image": frame, "observation/state": np.zeros(8),
         "prompt": "pick up the red block", "unnorm_key": "viola"}
answer = policy.infer(asked)
try:
    policy.infer({**asked, "prompt": ""})
    refusal = None
except RuntimeError as error:
    refusal = str(error)
again = policy.infer({**asked, "seed": np.int64(3)})
try:
    WebsocketClientPolicy("127.0.0.1", int(sys.argv[1]), api_key="wrong-wrong-wrong")
    stranger = None
except Exception as error:
    stranger = f"{type(error).__name__}: {error}"
print(json.dumps({
    "numpy": np.__version__, "metadata": policy.get_server_metadata(), "dtype": str(answer["actions"].dtype),
    "actions": answer["actions"].tolist(), "again": again["actions"].tolist(), "clamped": answer["clamped"],
    "timing": answer["server_timing"], "refusal": refusal, "stranger": stranger,
}))
"""


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Python with openpi-client, as a robot's machine has it: with NumPy 1, and nothing of ours."""
    folder = tmp_path_factory.mktemp("robot") / "venv"
    run(sys.executable, "-m", "venv", folder)
    run(folder / "bin/pip", "install", "--quiet", "--disable-pip-version-check", *CLIENT)
    return folder / "bin/python"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("serve") / "tiny", chunk=2)


@pytest.fixture(scope="module")
def server(checkpoint: Path) -> Iterator[Command]:
    with command(checkpoint, "--token", TOKEN) as running:
        yield running


def test_the_real_client_gets_the_policys_answers(
    client: Path, checkpoint: Path, server: Command, tmp_path: Path
) -> None:
    np.save(tmp_path / "frame.npy", FRAME)
    done = run(client, "-c", TALK, str(server.port), tmp_path / "frame.npy", TOKEN)
    told: dict[str, Any] = json.loads(done.stdout)
    policy = tiny_policy(checkpoint)
    observation = Observation({"primary": FRAME}, "pick up the red block", "viola")
    expected = policy.answer([policy.question(observation)])[0].actions.astype(np.float32)
    assert told["numpy"].startswith("1.")
    assert told["dtype"] == "float32"
    assert told["actions"] == told["again"] == expected.tolist()
    assert (told["metadata"]["chunk"], told["metadata"]["cameras"]) == (2, ["primary"])
    assert told["metadata"]["action_names"][-1] == "gripper"
    assert told["timing"]["total"] > told["timing"]["prefill"] > 0
    assert told["clamped"] == []
    assert told["refusal"].splitlines()[1].startswith("prompt: the instruction '' is empty")
    assert "Traceback" not in told["refusal"]
    assert "401" in told["stranger"]


def test_the_pages_robot_runs_as_it_stands(client: Path, server: Command) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert len(code.splitlines()) <= 15
    code = code.replace('"127.0.0.1", 8000', f'"127.0.0.1", {server.port}, api_key="{TOKEN}"')
    done = subprocess.run([client, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("['bridge_orig', 'viola'] ['x', 'y', 'z',")
    assert [line.split()[0] for line in lines if line[0].isdigit()] == [f"{i}" for i in range(8)]


def test_the_page_is_one_page_and_its_commands_are() -> None:
    assert len(PAGE.splitlines()) <= 130
    blocks = re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)
    assert len(blocks) == 4
    for line in blocks:
        words = [word for word in shlex.split(line) if "=" not in word]
        assert words[:2] == ["oxe-mix", "serve"]
        own = get_command(app).commands["serve"]  # type: ignore[attr-defined]
        assert own.make_context("here", words[2:], resilient_parsing=False)


def test_what_the_page_shows_is_what_is_said(server: Command, checkpoint: Path) -> None:
    shown = PAGE.split("```\n")[2].splitlines()
    said = [
        line.replace(f":{server.port}", ":8000").replace(str(checkpoint), "runs/first")
        for line in server.said
    ]
    said = [re.sub(r"loaded in \d+ s", "loaded in 3 s", line) for line in said]
    assert [line.replace("chunks of 2", "chunks of 1") for line in said if not line.startswith("[")] == shown


def test_the_pages_numbers_are_the_defaults(tmp_path: Path) -> None:
    caps = Caps()
    text = " ".join(PAGE.split())
    assert f"--max-message-mb` ({caps.message_bytes / 2**20:.0f})" in text
    assert f"`--max-pixels` ({caps.image_pixels:,} an image)" in text
    assert f"`--max-text` ({caps.text_length:,} characters)" in text
    assert f"`--max-connections` ({caps.connections}, and 16 more" in text
    assert len(DTYPES) == 11
    (keys,) = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    (tmp_path / "keys.yaml").write_text(keys)
    assert obs_keys(Asking(), tmp_path / "keys.yaml").items() >= yaml.safe_load(keys).items()
