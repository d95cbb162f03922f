"""CHILD: the process that runs one native llama-server (xllamacpp) for one version.

Started by `llama_engine.py` as `python -m chat_app.serving.llama_process`, or as a spare by `spare_process.py`. It
loads the native library, reads one JSON line from stdin (model, adapter, limits, key, log file), writes one JSON line
to stdout once the model is loaded ({"address": …}), and then serves on loopback until its stdin closes. The system
closes that pipe when the parent ends, kill -9 included, so no server outlives its owner. Everything the native code
prints goes to stderr, which is the engine's log file.

Nothing of the product is imported here, and the key is never on the command line.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from contextlib import suppress
from typing import Any

PROMPT_CACHE_MIB = 256
WARNINGS_ONLY = 2
# The native threads (OpenMP) spin for a moment while they wait for each other, then sleep. Their default, to spin on,
# holds a core that a busy neighbour needs, and then all wait for the one that has none (half the speed beside one busy
# process); to sleep at once makes two answers together cost 2.7 times one instead of 1.6.
WAITING = {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "500"}


def main() -> None:
    """Serve until stdin closes. Exit code 1 with the reason on stderr when the server cannot start."""
    report = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the native code prints to stdout belongs in the log, not in our report
    with suppress(ImportError):  # said below, where there is a log
        _library()
    line = sys.stdin.buffer.readline()
    if not line:
        return  # the parent is gone, or has no use for this child
    config = json.loads(line)
    if log_path := config.get("log_path"):
        with open(log_path, "ab") as log:  # noqa: PTH123 (pathlib is not loaded here)
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
    watcher = threading.Thread(target=_exit_with_parent, daemon=True)
    watcher.start()
    try:
        server = _serve(config)
    except ImportError as error:
        print(f"xllamacpp cannot be loaded ({error}): pip install 'zephyr-loop[llama]'", file=sys.stderr, flush=True)
        os._exit(1)
    except RuntimeError as error:
        print(error, file=sys.stderr, flush=True)
        os._exit(1)
    print(json.dumps({"address": server.listening_address}), file=report, flush=True)
    watcher.join()


def _library() -> Any:
    """The native library. Raises ImportError."""
    for name, value in WAITING.items():  # read once, when the library is loaded
        os.environ.setdefault(name, value)
    import xllamacpp

    return xllamacpp


def _serve(config: dict[str, Any]) -> Any:
    """The running server, its model loaded. Raises ImportError and RuntimeError."""
    xllamacpp = _library()
    params = xllamacpp.CommonParams()
    params.model.path = config["base_gguf"]
    if config["adapter_gguf"]:
        params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(config["adapter_gguf"], 1.0)]
    params.hostnames = ["127.0.0.1"]
    params.port = 0  # the system picks a free one
    params.api_keys = [config["key"]]
    params.n_ctx = config["context_tokens"]
    params.n_parallel = config["parallel"]
    params.kv_unified = True  # one stream may use the whole context while the others are idle
    params.cpuparams.n_threads = config["threads"]
    params.cpuparams_batch.n_threads = config["batch_threads"]
    params.cache_prompt = True
    params.cache_ram_mib = PROMPT_CACHE_MIB
    params.fit_params = False  # it would load the model once more to see how much fits; the engine looks before
    params.warmup = False  # the engine's check is the warm-up
    params.ui = False
    params.verbosity = WARNINGS_ONLY
    return xllamacpp.Server(params)


def _exit_with_parent() -> None:
    while sys.stdin.buffer.read(4096):
        pass
    os._exit(0)  # at once: the native server has nothing to save


if __name__ == "__main__":
    main()
