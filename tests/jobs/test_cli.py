"""The command line: recipes, dotted overrides, and errors before any cluster work."""

import subprocess
import sys
from pathlib import Path

import pytest

from jobs import cli
from jobs.recipes import RECIPES, toy_cpu

ROOT = Path(__file__).parents[2]


def test_without_arguments_it_is_toy_cpu_in_runs():
    options = cli.parse([], "")
    assert options.recipe == toy_cpu()
    assert (options.storage, options.source, options.model) == ("runs", None, None)


def test_overrides_reach_every_depth():
    arguments = ["toy_cpu", "--video.optimizer.num-steps", "7", "--source", "clips", "--vae.vae.base-dim", "24"]
    options = cli.parse(arguments, "")
    assert options.recipe.video.optimizer.num_steps == 7
    assert options.recipe.vae.vae.base_dim == 24
    assert options.recipe.vae.optimizer == toy_cpu().vae.optimizer
    assert options.source == "clips"


def test_images_and_videos_are_given_by_flags_and_need_a_prompt(capsys):
    prompt = ["--sample.prompts", "a red circle", "--sample.num-frames", "33"]
    given = ["--sample.given.begin", "a.png", "--sample.given.end", "b.png", "--sample.generate.window-frames", "17"]
    sample = cli.parse([*prompt, *given], "").recipe.sample
    assert (sample.given.files, sample.num_frames) == ({"begin": "a.png", "end": "b.png"}, 33)
    assert sample.generate.window_frames == 17
    with pytest.raises(SystemExit):
        cli.parse(given, "")
    assert "begin, end given, must say" in " ".join(capsys.readouterr().err.replace("│", " ").split())


def test_unknown_names_are_errors(capsys):
    with pytest.raises(SystemExit, match="unknown recipe 'tiny'; known: smoke_cpu, toy_cpu"):
        cli.parse(["tiny"], "")
    with pytest.raises(SystemExit):
        cli.parse(["--video.optimizer.num-stepz", "7"], "")
    assert "num-stepz" in capsys.readouterr().err


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_build_and_say_what_they_are_for(name):
    recipe = RECIPES[name]()
    assert RECIPES[name].__doc__
    assert recipe.video.dit.in_channels == recipe.vae.vae.z_dim
    assert recipe.video.dit.text_dim == recipe.vae.text.dim
    assert recipe.video.plan.quadratic_tokens == 2 * toy_cpu().video.dit.dim + toy_cpu().video.dit.ffn_dim


def test_a_missing_source_is_one_line_and_exit_1(tmp_path):
    command = [sys.executable, ROOT / "jobs" / "curate_clips.py", "--source", "no/such/folder", "--storage", tmp_path]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert run.returncode == 1
    assert "no/such/folder" in run.stderr
    assert "Traceback" not in run.stderr
