"""bitune serve as a process, asked by OpenAI's own client."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import uvicorn
from fastapi.testclient import TestClient

from bitune_kernels import BituneModel
from bitune_kernels.cli import main
from bitune_kernels.commands.serve import GRACE
from tests.test_trainers import WORDS, tokenizer
from tests.tiny import base_model, bitune_model

VOCAB, LIMIT, TOKENS = 4 + len(WORDS), 80, 6


def chat_tokenizer():
    """Of whole words: a stream holds back the bytes of an unfinished character."""
    words = tokenizer()
    words.chat_template = "{% if messages[0].role == 'bot' %}{{ raise_exception('no bots') }}{% endif %}"
    words.chat_template += "{% for m in messages %}{{ m.content }} {{ eos_token }} {% endfor %}"
    return words


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("serve")
    base_model(vocab_size=VOCAB).save_pretrained(place / "model")
    chat_tokenizer().save_pretrained(place / "model")
    bitune_model(base=base_model(vocab_size=VOCAB)).save_pretrained(place / "adapter")
    return place


def test_a_wrong_request_is_named_and_the_model_after_its_run(place, tmp_path, monkeypatch, capsys):
    apps = []
    monkeypatch.setattr(uvicorn, "run", lambda app, **options: apps.append(TestClient(app)))
    shutil.copytree(place / "adapter", tmp_path / "answers" / "final")
    (tmp_path / "answers" / "final" / "prompt_format.json").write_text('"question"')
    shutil.copytree(place / "model", tmp_path / "plain")
    (tmp_path / "plain" / "chat_template.jinja").unlink()
    for model in (place / "model", tmp_path / "plain"):
        assert main(["serve", "--model", str(model), "--adapter", str(tmp_path / "answers")]) == 0
        told = capsys.readouterr().err
        assert "bitune: serving the model 'answers'\n" in told and "bitune: trained on single questions" in told
    chat, completion = "/v1/chat/completions", "/v1/completions"
    say = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 2}
    for path, body, message in (
        (chat, say | {"max_tokens": 0}, "`max_new_tokens` must be greater than 0, but is 0."),
        (chat, say | {"max_tokens": -5, "stream": True}, "`max_new_tokens` must be greater than 0, but is -5."),
        (chat, say | {"max_tokens": "x"}, "invalid literal for int() with base 10: 'x'"),
        (chat, {"max_tokens": 2}, "expected a request of OpenAI's API, KeyError: 'messages'"),
        (chat, say | {"messages": 3}, "expected a request of OpenAI's API, TypeError"),
        (chat, say | {"messages": []}, "Cannot apply chat template to an empty conversation"),
        (chat, say | {"messages": [{"role": "bot"}]}, "expected a request of OpenAI's API, TemplateError: no bots"),
        (completion, {"prompt": "x", "stop": []}, "stop: expected a text or a list of texts, got []"),
        (completion, {"prompt": "x", "temperature": -1}, "temperature: expected a number from 0 to inf, got -1"),
        (chat, say | {"top_p": 1.5, "stream": True}, "top_p: expected a number from 0 to 1, got 1.5"),
        (completion, {"prompt": ["x", "y"]}, "prompt must be a string."),
        (chat, say | {"model": "gpt-9"}, "Server is pinned to 'answers'; requested 'gpt-9'."),
        (chat, say | {"n": 2}, "n: expected 1, all that is served, got 2"),
        (chat, say | {"response_format": {"type": "json_object"}}, 'response_format: expected {"type": "text"}, all'),
        (completion, {"prompt": "x", "logprobs": 5}, "logprobs: expected false, all that is served, got 5"),
        ("/v1/responses", {"input": "x", "previous_response_id": "r"}, "previous_response_id: expected none, all"),
        (chat, [], "expected a request of OpenAI's API, RequestValidationError: "),
    ):
        answer = apps[0].post(path, json=body)
        assert answer.status_code == 400 and answer.json()["error"]["message"].startswith(message), answer.text
    assert apps[0].post(chat, json=say | {"n": 1, "logprobs": None, "tool_choice": "auto"}).status_code == 200
    answer = apps[0].post("/v1/responses", json={"input": "x", "max_output_tokens": 2}).json()
    assert answer["object"] == "response" and answer["usage"]["output_tokens"] <= 2
    for path, body in ((chat, say), (completion, {"prompt": "x"}), ("/v1/responses", {"input": "x"})):
        ends = {"max_output_tokens": 12} if "input" in body else {"max_tokens": 12}

        def said(path=path, body=body | ends, **options):  # what differs is but the text
            answer = apps[0].post(path, json=body | options).json()
            found = answer.get("choices") or answer["output"]
            return [c.get("message") or c.get("text") or c.get("content") for c in found]

        greedy = said()
        assert said(temperature=0, top_p=0.9) == greedy == said()
        for how in ({"temperature": 1.5}, {"top_p": 0.95}):
            sampled = [said(seed=seed, **how) for seed in (1, 1, 2)]
            assert sampled[0] == sampled[1] and greedy not in sampled and sampled[0] != sampled[2]
    refused = apps[1].post(chat, json=say)
    assert refused.status_code == 400 and "chat_template is not set" in refused.json()["error"]["message"]
    answer = apps[1].post(completion, json={"prompt": "x", "max_tokens": 2})
    assert answer.status_code == 200 and answer.json()["usage"]["total_tokens"] == 3


def test_a_limit_of_one_connection_answers_it(place, monkeypatch):
    seen = []

    def run(app, **options):
        served = uvicorn.Server(uvicorn.Config(app, **options))
        with ThreadPoolExecutor(1) as pool:
            done = pool.submit(served.run)
            while not (served.started or done.done()):
                time.sleep(0.1)
            try:
                seen.append(urllib.request.urlopen(f"http://127.0.0.1:{options['port']}/health", timeout=30).status)
            finally:
                served.should_exit = True

    monkeypatch.setattr(uvicorn, "run", run)
    arguments = ["--model", str(place / "model"), "--adapter", str(place / "adapter"), "--host", "127.0.0.1"]
    assert main(["serve", *arguments, "--port", str(free_port()), "--limit", "1"]) == 0 and seen == [200]


def test_a_port_in_use_is_refused_before_the_model_is_loaded(place, capsys):
    with socket.create_server(("localhost", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert main(["serve", "--model", str(place / "none"), "--adapter", str(place / "adapter"), "--port", port]) == 2
    assert f"--host, --port: expected a free port, got localhost:{port}; " in capsys.readouterr().err


def test_an_address_of_ipv6_is_listened_on(place, monkeypatch):
    asked = []
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("needs a network interface with IPv6")
    monkeypatch.setattr(uvicorn, "run", lambda app, host, **options: asked.append(host))
    arguments = ["--model", str(place / "model"), "--adapter", str(place / "adapter"), "--port", str(free_port())]
    assert main(["serve", *arguments, "--host", "::1"]) == 0 and asked == ["::1"]


@pytest.fixture(scope="module")
def server(place):
    port = free_port()
    command = [sys.executable, "-m", "bitune_kernels.cli", "serve", "--model", place / "model"]
    command += ["--adapter", place / "adapter", "--host", "127.0.0.1", "--port", str(port), "--limit", str(LIMIT)]
    with (place / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 120
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
                break
            except (urllib.error.URLError, OSError):
                assert process.poll() is None and time.monotonic() < deadline, (place / "log").read_text()
                time.sleep(0.2)
        yield port, process
    finally:
        process.terminate()
        process.wait(30)


def resident(process) -> int:
    status = Path(f"/proc/{process.pid}/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) // 1024


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux (/proc)")
def test_fifty_clients_some_of_whom_hang_up(place, server):
    from openai import OpenAI

    port, process = server
    client = OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=100)
    assert [m.id for m in client.models.list()] == ["adapter"]
    model = BituneModel.from_pretrained(base_model(vocab_size=VOCAB), place / "adapter")
    words = chat_tokenizer()

    def messages(i):
        return [{"role": "user", "content": " ".join(WORDS[i % 5 : i % 5 + 4])}]

    def expected(i):
        prompt = words.apply_chat_template(
            messages(i), add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        out = model.generate(**prompt, max_new_tokens=TOKENS, do_sample=False)
        return words.decode(out[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True).split()

    def ask(i):
        options = dict(model="adapter", messages=messages(i), max_tokens=TOKENS, temperature=0)
        if i % 3 == 0:
            answer = client.chat.completions.create(**options)
            assert answer.model == "adapter"
            return answer.choices[0].message.content.split()
        stream = client.chat.completions.create(**options, stream=True)
        parts = []
        for chunk in stream:
            assert chunk.model == "adapter"
            parts.append(chunk.choices[0].delta.content or "")
            if i % 3 == 1:  # hangs up in the middle of its answer
                stream.close()
                return None
        return "".join(parts).split()

    torch.manual_seed(0)
    answers = [expected(i) for i in range(5)]
    resting = []
    for _ in range(3):
        with ThreadPoolExecutor(50) as pool:
            found = list(pool.map(ask, range(50)))
        assert [f for f in found if f is not None] == [answers[i % 5] for i, f in enumerate(found) if f is not None]
        assert found.count(None) == len([i for i in range(50) if i % 3 == 1])
        resting.append(resident(process))
    assert resting[2] - resting[1] < 20, resting  # MiB; the first round warms up


def test_what_is_wrong_has_a_status_and_the_server_stays(server):
    from openai import APIStatusError, OpenAI

    port, process = server
    client = OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=60)
    asked = dict(model="adapter", messages=[{"role": "user", "content": "x"}], max_tokens=2)
    for changes, status in (({"model": "gpt-9"}, 400), ({"extra_body": {"beams": 2}}, 422)):
        with pytest.raises(APIStatusError) as refused:
            client.chat.completions.create(**asked | changes)
        assert refused.value.status_code == status
    with pytest.raises(APIStatusError) as refused:
        client.post("/systemone", body={}, cast_to=object)
    assert refused.value.status_code == 404
    long = asked | {"messages": [{"role": "user", "content": "x " * 300}]}
    for options in (long, long | {"stream": True}):
        with pytest.raises(APIStatusError) as refused:
            client.chat.completions.create(**options)
        assert refused.value.status_code == 400
        assert "prompt: expected fewer than the 256 tokens of the model, got 301" in str(refused.value)
    filled = client.chat.completions.create(**asked | {"max_tokens": 100000})
    assert filled.usage.total_tokens == 256 and filled.choices[0].finish_reason == "length"
    idle = [socket.create_connection(("127.0.0.1", port)) for _ in range(LIMIT)]
    with pytest.raises(APIStatusError) as refused:
        OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0).chat.completions.create(**asked)
    assert refused.value.status_code == 503
    for connection in idle:
        connection.close()
    time.sleep(0.5)
    assert client.chat.completions.create(**asked).choices[0].finish_reason in ("length", "stop")
    assert process.poll() is None


def test_answers_in_the_making_do_not_keep_the_server(server):  # the last test: it stops the server
    port, process = server
    body = json.dumps({"model": "adapter", "prompt": "x", "max_tokens": 255}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n"
    clients = [socket.create_connection(("127.0.0.1", port)) for _ in range(40)]
    for client in clients:
        client.sendall(f"{head}Content-Type: application/json\r\n\r\n".encode() + body)
    time.sleep(0.5)
    process.terminate()
    process.wait(GRACE + 5)  # of a minute's work
    for client in clients:
        client.close()
