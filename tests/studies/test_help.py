"""Protects the --help of the study scripts: what each does, and example commands that it takes."""

import pytest
from repository import SCRIPTS, load_script

# Prints what it measures and takes no flags, so that it runs at commits before these.
WITHOUT_FLAGS = {"fingerprint"}
ESTIMATES = {"estimate_sequence_parallel"}  # nothing to tell it
NAMES = sorted({path.stem for path in (SCRIPTS / "studies").glob("*.py")} - WITHOUT_FLAGS) + ["encode_long"]


@pytest.mark.parametrize("name", NAMES)
def test_help_says_what_a_study_does_and_shows_its_commands(name, capsys):
    script = load_script(name)
    for flag in ("--help", "--help-all"):
        with pytest.raises(SystemExit) as ended:
            script.main([flag])
        assert ended.value.code == 0
    text = capsys.readouterr().out
    assert script.__doc__.splitlines()[0] in text
    commands = [line for line in script.__doc__.splitlines() if line.startswith(("python ", "accelerate launch "))]
    assert commands and all(f"  {command}\n" in text for command in commands)
    assert all(f"scripts/studies/{name}.py" in line or f"scripts/{name}.py" in line for line in commands)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ESTIMATES])
def test_examples_of_a_study_are_commands_that_it_takes(name, tmp_path, monkeypatch):
    script = load_script(name)
    monkeypatch.chdir(tmp_path)
    for line in script.__doc__.splitlines():
        if line.startswith(("python ", "accelerate launch ")):
            words = line.split("#")[0].split()
            script.parse(words[words.index(next(word for word in words if word.endswith(".py"))) + 1 :])
