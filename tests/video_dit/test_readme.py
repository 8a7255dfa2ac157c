"""The library's page: its snippets run in order and give what they say, and its table names every module."""

import ast
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import diffusers
import torch

import video_dit
from video_dit.model import VideoDiT

LIBRARY = Path(video_dit.__file__).parent
PAGE = LIBRARY / "README.md"
ARROW = "  # -> "  # what stands behind it is the repr of the expression before


def blocks(language):
    """The page's fenced blocks of a language: number of the line before the first, and text."""
    text = PAGE.read_text()
    for block in re.finditer(rf"^```({language})\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        yield text[: block.start(2)].count("\n"), block[1], block[2]


def run_python(first_line, source, names):
    """Execute statement by statement; an expression with an arrow must have the value that is shown."""
    lines, tree, num_shown = source.splitlines(), ast.parse(source), 0
    ends = [statement.end_lineno - 1 for statement in tree.body]
    for statement, end in zip(ast.increment_lineno(tree, first_line).body, ends, strict=True):
        _, arrow, shown = lines[end].partition(ARROW)
        if arrow and isinstance(statement, ast.Expr):
            value = eval(compile(ast.Expression(statement.value), PAGE, "eval"), names)
            assert repr(value) == shown, f"{PAGE.name}:{statement.end_lineno}"
            num_shown += 1
        else:
            exec(compile(ast.Module([statement], []), PAGE, "exec"), names)
    assert num_shown == source.count("# ->"), f"{PAGE.name}:{first_line}: an arrow that is behind no expression"


def run_console(first_line, source):
    """Run the command behind the prompt; what it prints must be what is shown."""
    command, shown = source.removeprefix("$ ").split("\n", 1)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    ended = subprocess.run(shlex.split(command), capture_output=True, text=True, env=environment, timeout=100)
    assert (ended.returncode, ended.stdout) == (0, shown), f"{PAGE.name}:{first_line}: {ended.stderr}"


def save_published(folder):
    """What a published pipeline folder holds of a transformer and a VAE, with fewer and random weights."""
    sizes = {"num_attention_heads": 2, "attention_head_dim": 12, "ffn_dim": 24, "num_layers": 1}
    diffusers.WanTransformer3DModel(**sizes).save_pretrained(folder / "transformer")
    diffusers.AutoencoderKLWan(base_dim=8).save_pretrained(folder / "vae")


def test_the_snippets_give_what_they_say(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_published(tmp_path / "Wan2.1-T2V-1.3B-Diffusers")
    names = {}
    for first_line, language, source in blocks("python|console"):
        if language == "console":
            run_console(first_line, source)
        elif script := re.match(r"# (\S+\.py)\n", source):
            Path(script[1]).write_text(source)
        else:
            run_python(first_line, source, names)
    before, trained = (VideoDiT.from_pretrained(folder).state_dict() for folder in ("my-model", "trained"))
    assert not [name for name, value in before.items() if torch.equal(value, trained[name])]


def test_the_table_names_every_module():
    files = {str(path.relative_to(LIBRARY)) for path in LIBRARY.rglob("*.py") if path.name != "__init__.py"}
    table = PAGE.read_text().partition("\n## What is where\n")[2]
    cells = re.findall(r"^\| (`.*?) \|", table, re.MULTILINE)
    assert sorted(re.findall(r"`([^`]*\.py)`", " ".join(cells))) == sorted(files)
