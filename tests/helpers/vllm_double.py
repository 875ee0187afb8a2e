"""A small HTTP server that answers as vLLM does: its answers are recordings of vLLM's with other values in them.

It plays the weights that it is given, with torch, so what bcft checks about a server can be checked against it. As a
process it takes `BCFT_DOUBLE_PAUSE` seconds longer for a question.

    python vllm_double.py --model DIRECTORY --port PORT ...
"""

import copy
import json
import os
import sys
import threading
import time
from contextlib import nullcontext
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from bcft.generation.vllm.client import Client

RECORDED = json.loads((Path(__file__).parents[1] / "generation" / "vllm_recorded.json").read_text(encoding="utf-8"))


class Double:
    """vLLM on a directory of weights. adapters: name -> directory; key: what it wants as a bearer token."""

    def __init__(
        self, model, *, adapters=None, key="", loads=True, developers=False, context=None, name="bcft", port=0
    ):
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
        self.name, self.key, self.loads, self.developers = name, key, loads, developers
        self.context = context or self.model.config.max_position_embeddings
        self.adapters, self.ever = {}, []
        self.generator = torch.Generator().manual_seed(0)
        self.lock = threading.RLock()
        self.number = 0
        self.asked = []  # the bodies of all questions for completions
        self.broken = {}  # number of a question -> how it breaks
        self.dead = False
        for adapter, path in (adapters or {}).items():
            self.load(adapter, path)
        self.http = ThreadingHTTPServer(("127.0.0.1", port), _handler(self))
        self.http.daemon_threads = True
        self.thread = threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self.thread.start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.http.server_port}"

    def close(self):
        self.dead = True
        self.http.shutdown()
        self.http.server_close()

    def answer(self, path, body):
        """Return (status, body) for a request; a question has a body."""
        if self.dead:
            return recorded("engine_dead_health" if path == "/health" else "engine_dead")
        if path == "/health":
            return recorded("health")
        if path == "/v1/models":
            return recorded("models", data=self.cards())
        with self.lock:
            if path == "/v1/completions":
                return self.complete(body)
            if path == "/v1/load_lora_adapter" and self.loads:
                return self.loaded(body)
            if path == "/v1/unload_lora_adapter" and self.loads:
                known = self.adapters.pop(body["lora_name"], None)
                return recorded("unload" if known else "unload_again")
            if path == "/collective_rpc" and self.developers:
                self.model = AutoModelForCausalLM.from_pretrained(body["kwargs"]["weights_path"], dtype=torch.float32)
                return 200, {"results": [None]}
            if path == "/reset_prefix_cache" and self.developers:
                return 200, ""
        return recorded("no_dev")

    def cards(self):
        base, adapter = RECORDED["models"]["body"]["data"]
        return [
            base | {"id": self.name, "max_model_len": self.context},
            *(adapter | {"id": name, "root": path, "parent": self.name} for name, path in self.adapters.items()),
        ]

    def load(self, name, path):
        from peft import PeftModel

        if hasattr(self.model, "peft_config"):
            if name not in self.ever:
                self.model.load_adapter(path, adapter_name=name)
        else:
            self.model = PeftModel.from_pretrained(self.model, path, adapter_name=name).eval()
        self.adapters[name] = path
        self.ever.append(name)

    def loaded(self, body):
        name, path = body["lora_name"], body["lora_path"]
        if name in self.adapters:
            return recorded("load_again")
        if not (Path(path) / "adapter_config.json").is_file():
            return recorded("load_missing")
        self.load(name, path)
        return recorded("load")

    def complete(self, body):
        model, prompt = body["model"], body["prompt"]
        self.asked.append(body)
        time.sleep(float(os.environ.get("BCFT_DOUBLE_PAUSE", "0")))
        vocabulary = self.model.get_input_embeddings().num_embeddings
        if model != self.name and model not in self.adapters:
            return recorded("unknown_model")
        if max(prompt) >= vocabulary:
            return recorded("unknown_token")
        if len(prompt) + body["max_tokens"] > self.context:
            return recorded("too_long")
        if body["temperature"] == 0 and body.get("n", 1) > 1:
            return recorded("greedy_n")
        template = RECORDED["greedy"]["body"]["choices"][0]
        choices = []
        for index, (ids, logprobs, stopped) in enumerate(self.sample(model, body)):
            choice = copy.deepcopy(template)
            choice |= {
                "index": index, "token_ids": ids, "prompt_token_ids": prompt, "text": "",
                "finish_reason": "stop" if stopped else "length", "stop_reason": ids[-1] if stopped else None,
            }  # fmt: skip
            choice["logprobs"]["token_logprobs"] = logprobs
            choices.append(choice)
        return recorded("greedy", model=model, choices=choices[::-1])

    @torch.no_grad()
    def sample(self, model, body):
        """Return (ids, log-probabilities, whether it stopped) for each of `n` samples."""
        if hasattr(self.model, "peft_config") and model in self.adapters:
            self.model.set_adapter(model)
        stop = torch.tensor(body.get("stop_token_ids", []))
        read, prompt = torch.tensor([body["prompt"]] * body.get("n", 1)), len(body["prompt"])
        logprobs, done = [], torch.zeros(len(read), dtype=torch.bool)
        while len(logprobs) < body["max_tokens"] and not done.all():
            with self.model.disable_adapter() if self._plain(model) else nullcontext():
                logits = self.model(read).logits[:, -1].float()
            if body["temperature"] == 0:
                tokens = logits.argmax(-1)
            else:
                warped = (logits / body["temperature"]).softmax(-1)
                tokens = torch.multinomial(warped, 1, generator=self.generator)[:, 0]
            logprobs.append(logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0])
            read = torch.cat([read, tokens[:, None]], dim=1)
            done |= torch.isin(tokens, stop)
        for ids, values in zip(read[:, prompt:].tolist(), torch.stack(logprobs, dim=1).tolist(), strict=True):
            last = next((place for place, token in enumerate(ids) if token in stop), None)
            made = len(ids) if last is None else last + 1
            yield ids[:made], values[:made], last is not None

    def _plain(self, model):
        return hasattr(self.model, "peft_config") and model not in self.adapters


class DoubleServer:
    """In the place of `server.Server`: what it starts is a double in this process."""

    def __init__(self, **settings):
        self.settings = settings
        self.log = Path("server.log")
        self.started = []  # the arguments of each start
        self.double = None
        self.doubles = []
        self.port = 0
        self.why = "MemoryError: killed by the system"

    def start(self, arguments, *, port=0):  # noqa: ARG002 - as Server.start
        self.stop()
        self.started.append(list(arguments))
        given = dict(pairwise(arguments))
        lora = json.loads(given["--lora-modules"]) if "--lora-modules" in given else None
        assert lora is None or "--enable-lora" in arguments
        settings = {"loads": "--enable-lora" in arguments} | self.settings
        adapters = {lora["name"]: lora["path"]} if lora else {}
        self.double = Double(given["--model"], adapters=adapters, key="secret", **settings)
        self.doubles.append(self.double)
        return Client(self.double.url, key="secret")

    def running(self):
        return self.double is not None and not self.double.dead

    def stop(self):
        if self.double is not None:
            self.double.close()
        self.double = None

    def reason(self):
        return self.why


def recorded(name, **values):
    """Return the status and body of a recording, with other values."""
    answer = RECORDED[name]
    return answer["status"], (answer["body"] | values if values else answer["body"])


def _handler(double):
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def do_GET(self):
            self.reply(None)

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self.reply(body)

        def reply(self, body):
            breaks = ""
            if self.path == "/v1/completions":
                with double.lock:
                    double.number += 1
                    breaks = double.broken.pop(double.number, "")
            if double.key and self.path.startswith("/v1") and self.headers["Authorization"] != f"Bearer {double.key}":
                status, answer = recorded("unauthorized")
            elif breaks == "refused":
                return
            elif breaks == "dies":
                double.dead = True
                status, answer = recorded("engine_dead")
            elif breaks.isdigit():
                status, answer = int(breaks), {"error": {"message": "busy", "code": int(breaks)}}
            else:
                status, answer = double.answer(self.path, body)
            content = (answer if isinstance(answer, str) else json.dumps(answer)).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[: len(content) // 2] if breaks == "cut" else content)

    return Handler


def main():
    given = dict(pairwise(sys.argv[1:]))
    lora = json.loads(given.get("--lora-modules", "{}"))
    double = Double(
        given["--model"],
        adapters={lora["name"]: lora["path"]} if lora else {},
        key=os.environ["VLLM_API_KEY"],
        port=int(given["--port"]),
    )
    double.thread.join()


if __name__ == "__main__":
    main()
