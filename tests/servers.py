"""A real PostgreSQL, for the tests of shared storages."""

from __future__ import annotations

import os
import pwd
import shutil
import socket
import subprocess
import tempfile
from pathlib import Path

import pytest

PASSWORD = "p@ss/w%rd"  # with all that has to be quoted in a URL
QUOTED = "p%40ss%2Fw%25rd"


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


class PostgreSQL:
    """A server of its own, in a temporary directory, on a free port of this machine.

    PostgreSQL refuses to run as root: then it runs as the user that Debian's package makes.
    """

    def __init__(self, max_connections: int = 100) -> None:
        self._max_connections = max_connections
        found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
        if not found:
            pytest.skip("PostgreSQL is not installed (Debian: apt-get install postgresql)")
        pytest.importorskip("psycopg", reason="psycopg is not installed")
        self._binaries = found[-1].parent
        self._user = "postgres" if os.geteuid() == 0 else None
        self._directory = Path(tempfile.mkdtemp(prefix="postgresql-"))
        self.port = free_port()
        if self._user is not None:
            entry = pwd.getpwnam(self._user)
            os.chown(self._directory, entry.pw_uid, entry.pw_gid)
        password = self._directory / "password"
        password.write_text(PASSWORD)
        password.chmod(0o644)
        self._run("initdb", "-D", "data", "-U", "search", "-A", "scram-sha-256", "-E", "UTF8",
                  "--no-sync", "--no-locale", f"--pwfile={password}")  # fmt: skip
        self.start()

    def start(self) -> None:
        options = (
            f"-p {self.port} -k {self._directory} -c listen_addresses=127.0.0.1 -c fsync=off "
            f"-c max_connections={self._max_connections}"
        )
        self._run("pg_ctl", "-D", "data", "-l", "log", "-w", "-o", options, "start")

    def stop(self) -> None:
        self._run("pg_ctl", "-D", "data", "-w", "-m", "fast", "stop")

    def remove(self) -> None:
        subprocess.run(
            self._command("pg_ctl", "-D", "data", "-w", "-m", "immediate", "stop"),
            cwd=self._directory,
            capture_output=True,
        )
        shutil.rmtree(self._directory, ignore_errors=True)

    def make_database(self, name: str) -> str:
        """Create an empty database; returns its URL."""
        import psycopg

        with psycopg.connect(
            host="127.0.0.1",
            port=self.port,
            user="search",
            password=PASSWORD,
            dbname="postgres",
            autocommit=True,
        ) as connection:
            connection.execute(f'CREATE DATABASE "{name}"')
        return f"postgresql+psycopg://search:{QUOTED}@127.0.0.1:{self.port}/{name}"

    def _command(self, program: str, *words: str) -> list[str]:
        command = [str(self._binaries / program), *words]
        return ["runuser", "-u", self._user, "--", *command] if self._user else command

    def _run(self, program: str, *words: str) -> None:
        done = subprocess.run(
            self._command(program, *words),
            cwd=self._directory,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,  # the server inherits it: a pipe would never end
            stderr=subprocess.DEVNULL,
        )
        log = self._directory / "log"
        assert done.returncode == 0, log.read_text() if log.exists() else program
