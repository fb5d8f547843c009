"""How a server ends: what it took is answered, what comes later is refused, and the process says that all is well."""

import os
import signal
import stat
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from tests.cli.commands import onerec, refused
from tests.serving.running import Running

GOOD = {"history": ["m1", "m2"]}


def test_what_was_taken_is_answered_and_what_comes_later_refused(folder):
    with Running(folder, max_batch_size=2) as server, ThreadPoolExecutor(8) as pool:
        server.hold()
        taken = [pool.submit(server.post, GOOD) for _ in range(6)]  # two in computation, four in the queue
        server.wait_until(lambda: server.service.batcher.computing + server.service.batcher.queue_length == 6)
        server.stop()
        server.wait_until(lambda: server.service.draining)
        late = server.post(GOOD)
        assert late.status_code == 503
        assert "stopping" in late.json()["detail"]
        assert late.headers["retry-after"] == "1"
        assert late.headers["connection"] == "close"
        assert server.get("/ready").status_code == 503
        assert server.get("/health").status_code == 200
        server.release()
        assert [response.result().status_code for response in taken] == [200] * 6
        server.wait_until(lambda: server.stopped)
        with pytest.raises(httpx.ConnectError):
            server.post(GOOD)


@pytest.mark.parametrize("ended_by", ["time", "second signal"])
def test_the_wait_has_an_end(folder, ended_by):
    with (
        Running(folder, max_batch_size=2, drain_timeout=0.3 if ended_by == "time" else 60) as server,
        ThreadPoolExecutor(8) as pool,
    ):
        server.hold()
        taken = [pool.submit(server.post, GOOD) for _ in range(6)]
        server.wait_until(lambda: server.service.batcher.computing + server.service.batcher.queue_length == 6)
        computing = (
            server.service.batcher.computing
        )  # 2, or 1 where the second request came after the first one's wait
        server.stop()
        server.wait_until(lambda: server.service.draining)
        if ended_by == "second signal":
            server.stop()
        server.wait_until(lambda: server.service.batcher.queue_length == 0)
        server.release()  # what is in computation ends
        statuses = sorted(response.result().status_code for response in taken)
        assert computing in (1, 2)
        assert statuses == [200] * computing + [503] * (6 - computing)
        server.wait_until(lambda: server.stopped)


def test_the_command_refuses(folder, tmp_path, monkeypatch):
    monkeypatch.delenv("ONEREC_HF_TOKEN", raising=False)
    refused(onerec("serve"), "--model")
    refused(onerec("serve", "--model", tmp_path / "nothing", "--port", "0"), "--model", "no such folder")
    refused(onerec("serve", "--model", tmp_path, "--port", "0"), "--model", "config.json")
    for host in ("0.0.0.0", "::", "10.1.2.3"):
        message = refused(onerec("serve", "--model", folder, "--host", host, "--port", "0"), "token")
        assert "ONEREC_HF_TOKEN" in message
    refused(onerec("serve", "--model", folder, "--host", "no.such.host.invalid"), "--host no.such.host.invalid")
    refused(onerec("serve", "--model", folder, "--host", ""), "--host", "unknown address")
    refused(onerec("serve", "--model", folder, "--port", "70000"), "--port 70000")
    refused(onerec("serve", "--model", folder, "--unknown", "ignore"), "--unknown")
    refused(onerec("serve", "--model", folder, "--max_batch_size", "0"), "max_batch_size must be at least 1")
    refused(onerec("serve", "--model", folder, "--timeout", "nan"), "timeout")
    refused(onerec("serve", "--model", folder, "--max_top_k", "200"), "max_top_k=200 exceeds max_beams=128")
    with Running(folder) as server:
        port = server.url.rsplit(":", 1)[1]
        refused(onerec("serve", "--model", folder, "--port", port), f"--port {port}", "in use")


def test_tokens(tmp_path, monkeypatch):
    from onerec_hf.serving.access import read_token

    monkeypatch.delenv("ONEREC_HF_TOKEN", raising=False)
    assert read_token(None, None) is None
    file = tmp_path / "token"
    file.write_text("a-token-of-the-file\nmore\n")
    assert read_token(None, str(file)) == "a-token-of-the-file"
    monkeypatch.setenv("ONEREC_HF_TOKEN", "a-token-of-the-variable")
    assert read_token(None, None) == "a-token-of-the-variable"
    assert "ONEREC_HF_TOKEN" not in os.environ
    with pytest.raises(ValueError, match="pass only one"):
        read_token("a-token-of-the-option", str(file))
    for bad in ("", "short", "sixteen letters !", "sixteen-létters-!"):
        with pytest.raises(ValueError, match=r"^--token: the token must have at least 16") as error:
            read_token(bad, None)
        assert not bad or bad not in str(error.value)
    file.write_text("")
    with pytest.raises(ValueError, match=r"--token_file .*token: the token must have"):
        read_token(None, str(file))
    with pytest.raises(OSError, match="nothing"):
        read_token(None, str(tmp_path / "nothing"))


class Process:
    """`onerec-hf serve` in a process of its own."""

    def __init__(self, folder, log, *options, **env):
        self.log = log
        command = [
            sys.executable,
            "-m",
            "onerec_hf.cli.main",
            "serve",
            "--model",
            str(folder),
            "--port",
            "0",
            *options,
        ]
        with log.open("w") as file:
            self.process = subprocess.Popen(
                command, cwd=Path(__file__).parents[2], env=os.environ | env, stdout=subprocess.PIPE, stderr=file
            )
        self.wait_for("http://")
        self.url = next(part for part in log.read_text().split() if part.startswith("http://"))
        self.url = self.url.replace("0.0.0.0", "127.0.0.1")
        self.client = httpx.Client(timeout=120, limits=httpx.Limits(max_keepalive_connections=0), trust_env=False)
        end = time.monotonic() + 60
        while True:
            try:
                assert self.client.get(self.url + "/ready").status_code == 200
                return
            except httpx.ConnectError:
                assert time.monotonic() < end
                time.sleep(0.05)

    def wait_for(self, text):
        end = time.monotonic() + 180
        while text not in self.log.read_text():
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < end, self.log.read_text()
            time.sleep(0.05)

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()
        self.client.close()


@pytest.mark.slow
@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_signals_in_mid_flight_lose_nothing(folder, save, tmp_path, sent):
    """Bound to all addresses, with a token: reload by SIGHUP, then the end under load."""
    link = tmp_path / "current"
    link.symlink_to(folder)
    token = "a-secret-of-this-test"
    headers = {"authorization": f"Bearer {token}"}
    log = tmp_path / "log"
    with Process(link, log, "--host", "0.0.0.0", "--max_batch_size", "2", ONEREC_HF_TOKEN=token) as server:
        assert server.client.post(server.url + "/recommend", json=GOOD).status_code == 401
        before = server.client.get(server.url + "/ready").json()["model"]
        link.unlink()
        link.symlink_to(save(seed=1))
        server.process.send_signal(signal.SIGHUP)
        server.wait_for(f"replaces {before}")
        assert server.client.get(server.url + "/ready").json()["model"] != before
        body = GOOD | {"num_beams": 128, "session_length": 5}
        done = []

        def ask(_):
            try:
                response = server.client.post(server.url + "/recommend", json=body, headers=headers)
            except httpx.TransportError:  # the server has gone
                return "not taken"
            done.append(response.status_code)
            return response.status_code

        with ThreadPoolExecutor(24) as pool:
            answers = pool.map(ask, range(60))
            while len(done) < 6:
                time.sleep(0.005)
            server.process.send_signal(sent)
            statuses = list(answers)
        assert server.process.wait(60) == 0, log.read_text()
        assert set(statuses) <= {200, 503, "not taken"}
        assert statuses.count(200) >= 24  # those that were in flight
        assert server.process.stdout.read() == b""
        text = log.read_text()
        assert text.endswith("stopped\n")
        assert "Traceback" not in text
        assert token not in text
        command = Path(f"/proc/{server.process.pid}/cmdline")
        assert not command.exists() or token not in command.read_text()
    assert stat.S_ISLNK(os.lstat(link).st_mode)
