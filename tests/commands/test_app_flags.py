"""Protects the command that serves the app: its flags, and what it says before it loads or trains anything."""

import socket

import pytest

from fa_transformers import commands
from fa_transformers.commands import app as command


def test_flags_become_models_and_an_address():
    parsed = command.parse(["outputs/letters", "outputs/scans", "--host", "0.0.0.0", "--port", "8080"])
    assert parsed.models == ("outputs/letters", "outputs/scans")
    assert (parsed.options.host, parsed.options.port) == ("0.0.0.0", 8080)
    assert command.parse([]) == command.AppCommand((), command.AppOptions(host="127.0.0.1", port=7860))


@pytest.mark.parametrize("port", ["0", "65536"])
def test_a_port_that_cannot_be_ends_in_one_line(port, capsys):
    with pytest.raises(SystemExit) as ended:
        command.parse(["--port", port])
    assert ended.value.code == 2
    assert f"--port must be from 1 to 65535, got {port}" in capsys.readouterr().err.splitlines()[-1]


def test_a_port_that_is_taken_is_told_before_models_are_loaded(capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(SystemExit) as ended:
            commands.main(["app", "no/such/model", "--port", str(port)])
    assert ended.value.code == 2
    assert f"--host 127.0.0.1 --port {port} can't be listened at" in capsys.readouterr().err
