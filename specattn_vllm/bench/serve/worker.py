"""One server and its requests, in a process group of its own: `python -m specattn_vllm.bench.serve.worker JOB RESULT`.

RESULT is written anew whenever something begins or ends, so that who started it can say so, and what was measured
survives an end by force. Requests, logs and the client's own results are in the folder of RESULT.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

from specattn_vllm import cpu_runner
from specattn_vllm.bench.serve import client
from specattn_vllm.bench.serve.jobs import flags
from specattn_vllm.bench.serve.schema import Round, RoundResult, ServeJob, ServerResult
from specattn_vllm.bench.serve.server import HOST, IN_HASTE, Server, ServerFailed
from specattn_vllm.bench.serve.words import write_tokenizer
from specattn_vllm.bench.worker import fill_in
from specattn_vllm.causes import summary
from specattn_vllm.tools import models
from specattn_vllm.tools.engines import end_with_the_parent, path_of
from specattn_vllm.tools.interrupts import ended_as_interrupted, status_of
from specattn_vllm.tools.outputs import write_json

UNTIL_IT_IS_DONE = "interrupted", "ended before it was done"


class Worker:
    def __init__(self, job: ServeJob, result_path: Path) -> None:
        self.job, self.folder = job, result_path.parent
        self._result_path = result_path
        self.kv_bytes: dict[tuple[str, str], float] | None = {}
        """Read and present after the last round; None where that is not known."""
        status, reason = UNTIL_IT_IS_DONE
        # With the names of the models as they were given: their folders are this machine's.
        names = {role: job.models.get(role) or f"{job.shape}/{role}" for role in ("target", "draft", "eagle")}
        command = shlex.join(["vllm", "serve", names["target"], *flags(fill_in(job.engine_arguments, names))])
        self.result = ServerResult(name=job.name, status=status, reason=reason, job=job, command=command)

    def run(self) -> None:
        try:
            with tempfile.TemporaryDirectory(prefix="specattn-bench-") as made:
                self._run(Path(made))
            bad = [found for found in self.result.rounds if found.reason]
            self.result.status = "failed" if bad else "ok"
            self.result.reason = f"at {bad[0].rate} requests/s: {bad[0].reason}" if bad else None
        except Exception as error:
            traceback.print_exc()  # into the log
            self.result.status = "failed"
            self.result.reason = str(error) if isinstance(error, ServerFailed) else summary(error)
        self.write()

    def write(self, doing: str | None = None) -> None:
        self.result.doing = doing or self.result.doing
        write_json(self._result_path, self.result.model_dump(mode="json"))

    def _run(self, made: Path) -> None:
        folders = self.model_folders(made)
        arguments = [folders["target"], *flags(fill_in(self.job.engine_arguments, folders))]
        begun = time.monotonic()
        server = Server(arguments, self.environment(made), path_of(self.job.name, self.folder, "server.log"))
        try:
            self.write()
            server.wait_until_ready(self.job.ready_check_timeout_sec)
            self.result.start_seconds = round(time.monotonic() - begun, 1)
            self.result.runner = server.runner
            warm_up, *rounds = self.job.traffic.rounds
            self.write("warm-up")
            self.result.warm_up = self.measure(server, folders["target"], warm_up)
            if self.result.warm_up.reason:
                raise ServerFailed(f"warm-up: {self.result.warm_up.reason}")
            for number, each in enumerate(rounds, 1):
                self.write(f"rate {number} of {len(rounds)}: {each.rate} requests/s")
                self.result.rounds.append(self.measure(server, folders["target"], each))
                server.check()  # a client of a server that died says only that nobody answers
            self.write("stops")
        except BaseException:
            server.stop(IN_HASTE)
            raise
        server.stop()

    def measure(self, server: Server, model: str, of: Round) -> RoundResult:
        log, path = (path_of(f"{self.job.name} {of.rate}", self.folder, kind) for kind in ("client.log", "client.json"))
        path.unlink(missing_ok=True)
        before = self.kv_bytes
        if before is None:
            before = server.settled_kv_bytes()
        words = client.command(model, server.port, of, self.job.traffic, self.folder, path)
        with log.open("w") as file:
            process = subprocess.Popen(
                words, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, env=client_environment()
            )
        try:
            while process.poll() is None:
                server.check()
                time.sleep(0.1)
        finally:
            if process.poll() is None:
                process.kill()
            process.wait()
        if process.returncode or not path.exists():
            self.kv_bytes = None if self.job.ours else {}
            return client.failed(log, of, process.returncode)
        found = client.read(path, of)
        self.kv_bytes = after = server.settled_kv_bytes() if self.job.ours else {}
        for by in sorted({by for _, by in after}):
            read, present = (after[what, by] - before.get((what, by), 0.0) for what in ("read", "present"))
            if present:
                found.kv_read[by] = round(read / present, 4)
        return found

    def model_folders(self, made: Path) -> dict[str, str]:
        if self.job.shape is None:
            return {role: models.model_folder(role, name) for role, name in self.job.models.items()}
        shape = models.load_shape(self.job.shape)
        folders = models.model_folders(shape, made)
        write_tokenizer(folders["target"], shape.vocab_size, shape.max_position)
        return {role: str(folder) for role, folder in folders.items()}

    def environment(self, made: Path) -> dict[str, str]:
        """The server's: this process's, and for stock vLLM on a CPU without what lets it use runner V2."""
        if not (self.job.stock and self.job.on_cpu):
            return dict(os.environ)
        found = cpu_runner.without(os.environ)
        for part in cpu_runner.OVERLAY.glob(cpu_runner.VERSION):  # without it the command does not begin
            shutil.copytree(part, made / "version" / part.name)
        return found | {"PYTHONPATH": os.pathsep.join(filter(None, (str(made / "version"), found.get("PYTHONPATH"))))}


def client_environment() -> dict[str, str]:
    """vLLM's client would ask the environment's proxy, which does not know this machine's own ports."""
    return os.environ | {"VLLM_PLUGINS": "", "NO_PROXY": HOST, "no_proxy": HOST}


def main(arguments: list[str]) -> int:
    end_with_the_parent()
    job_path, result_path = map(Path, arguments)
    worker = Worker(ServeJob.model_validate_json(job_path.read_text()), result_path)
    try:
        with ended_as_interrupted():
            worker.run()
    except KeyboardInterrupt as interrupt:
        return status_of(interrupt)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
