"""One server and its requests, in a process group of its own: `python -m specattn_vllm.bench.serve.worker JOB RESULT`.

RESULT is written anew whenever something begins or ends, so that who started it can say so. Requests, logs and
the client's own results are in the folder of RESULT.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sys
import time
from pathlib import Path

from specattn_vllm import cpu_runner
from specattn_vllm.bench.serve import server as processes
from specattn_vllm.bench.serve.jobs import flags
from specattn_vllm.bench.serve.prompts import write_tokenizer
from specattn_vllm.bench.serve.schema import Round, RoundResult, ServeJob, ServerResult
from specattn_vllm.bench.worker import AnyWorker, fill_in
from specattn_vllm.tools import models
from specattn_vllm.tools.engines import end_with_the_parent, path_of
from specattn_vllm.tools.interrupts import ended_as_interrupted, status_of


class Worker(AnyWorker):
    def __init__(self, job: ServeJob, path: Path) -> None:
        self.folder, self.log = path.parent, path_of(job.name, path.parent, "server.log")
        # With the names of the models as they were given: their folders are this machine's.
        names = {role: job.models.get(role) or f"{job.shape}/{role}" for role in ("target", "draft", "eagle")}
        command = shlex.join(["vllm", "serve", names["target"], *flags(fill_in(job.engine_arguments, names))])
        log = f"{self.folder.name}/{self.log.name}"
        super().__init__(job, ServerResult(name=job.name, job=job, command=command, log=log), path)

    def measure(self, made: Path) -> tuple[str, str | None]:
        try:
            self._serve(made)
        except processes.ServerFailed as error:
            return "failed", str(error)
        bad = [f"at {found.rate} requests/s: {found.reason}" for found in self.result.rounds if found.reason]
        return ("failed", bad[0]) if bad else ("ok", None)

    def begin(self, doing: str) -> None:
        self.result.doing = doing
        self.write()

    def _serve(self, made: Path) -> None:
        folders = self.model_folders(made)
        arguments = [folders["target"], *flags(fill_in(self.job.engine_arguments, folders))]
        begun = time.monotonic()
        server = processes.Server(arguments, self.environment(made), self.log)
        try:
            self.begin("starts")
            server.wait_until_ready(self.job.ready_check_timeout_sec)
            self.result.start_seconds = round(time.monotonic() - begun, 1)
            self.result.runner = server.runner
            warm_up, *rounds = self.job.traffic.rounds
            self.begin("warm-up")
            self.result.warm_up = self._send(server, folders["target"], warm_up)
            if self.result.warm_up.reason:
                raise processes.ServerFailed(f"warm-up: {self.result.warm_up.reason}")
            for number, each in enumerate(rounds, 1):
                self.begin(f"rate {number} of {len(rounds)}: {each.rate} requests/s")
                self.result.rounds.append(self._send(server, folders["target"], each))
                server.check()  # a client of a server that died says only that nobody answers
            self.begin("stops")
        except BaseException:
            server.stop(processes.IN_HASTE)
            raise
        server.stop()

    def _send(self, server: processes.Server, model: str, of: Round) -> RoundResult:
        log, path = (path_of(f"{self.job.name} {of.rate}", self.folder, kind) for kind in ("client.log", "client.json"))
        path.unlink(missing_ok=True)
        before = server.kv_bytes() if self.job.ours else {}
        words = processes.client_command(model, server.port, of, self.job.traffic, self.folder, path)
        # It would ask the environment's proxy, which does not know this machine's own ports.
        variables = {"VLLM_PLUGINS": "", "NO_PROXY": processes.HOST, "no_proxy": processes.HOST}
        process = processes.started(words, os.environ | variables, log)
        try:
            while process.poll() is None:
                server.check()
                time.sleep(0.1)
        finally:
            process.kill()
            process.wait()
        if process.returncode or not path.exists():
            return processes.failed(log, of, process.returncode)
        found = processes.summed_up(json.loads(path.read_text()), of)
        after = server.kv_bytes() if self.job.ours else {}
        for by in sorted({by for _, by in after}):
            read, present = (after[what, by] - before[what, by] for what in ("read", "present"))
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
