"""A process that stands for vLLM's in tests: it is healthy at its port and has a child, as vLLM has its engine.

It writes the process ids and its environment to the file that `BCFT_DOUBLE` names. `BCFT_DOUBLE_DOES`: `fail` ends with
an error as vLLM logs one, `hang` never is healthy, `stubborn` ignores SIGTERM.

    python vllm_process.py --port PORT ...
"""

import json
import os
import signal
import subprocess
import sys
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

FAILED = """\
(EngineCore pid=7) WARNING 11-27 08:28:13 [system_utils.py:255] OSError: [Errno 24] Too many open files is possible
(Worker pid=8) ERROR 11-27 08:28:54 [multiproc_executor.py:909] ValueError: Unsupported head size 16
(EngineCore pid=7) ERROR 11-27 08:29:00 [core.py:1510] EngineCore failed to start.
(EngineCore pid=7) Exception: WorkerProc initialization failed due to an exception in a background process. See stack \
trace for root cause.
(APIServer pid=6) RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}
"""
SLEEP = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_{}); time.sleep(600)"


class Health(BaseHTTPRequestHandler):
    """Healthy."""

    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()


def main():
    does = os.environ.get("BCFT_DOUBLE_DOES", "")
    stubborn = does == "stubborn"
    if stubborn:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    child = subprocess.Popen([sys.executable, "-I", "-S", "-c", SLEEP.format("IGN" if stubborn else "DFL")])
    about = {"pids": [os.getpid(), child.pid], "environment": dict(os.environ), "arguments": sys.argv[1:]}
    path = Path(os.environ["BCFT_DOUBLE"])
    path.with_suffix(".tmp").write_text(json.dumps(about), encoding="utf-8")
    path.with_suffix(".tmp").replace(path)
    if does == "fail":
        print(FAILED, file=sys.stderr)
        raise SystemExit(1)
    if does == "hang":
        print("loading a large model", flush=True)
        time.sleep(600)
    HTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Health).serve_forever()


if __name__ == "__main__":
    main()
