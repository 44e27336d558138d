"""A plugin of vLLM's that kills its own process between two layers, while a file is there: test_server_faults.py gives
it to a server. DIE: `drafting` or `verifying`; DIE_WHEN: the file, which is renamed by the process that dies."""

import os
import signal


def install() -> None:
    from vllm.model_executor.layers.attention import Attention

    forward = Attention.forward

    def may_be_the_last(layer, query, *more, **named):
        stage = "drafting" if layer.layer_name.startswith("draft_model.") else "verifying"
        when = os.environ["DIE_WHEN"]
        # A batch with a prompt has more tokens.
        now = "layers.1." in layer.layer_name and query.shape[0] <= 40 and stage == os.environ["DIE"]
        if now and os.path.exists(when):
            os.rename(when, f"{when}.by.{os.getpid()}")
            os.kill(os.getpid(), signal.SIGKILL)
        return forward(layer, query, *more, **named)

    Attention.forward = may_be_the_last
