"""The compiler half that Triton's discovery asks for; reaching it means that a kernel escaped the interpreter."""

from triton.backends.compiler import BaseBackend

_ESCAPED = "a Triton kernel reached the compiler of the interpreter-only 'cpu' backend: set TRITON_INTERPRET=1"


class InterpreterCompiler(BaseBackend):
    @staticmethod
    def supports_target(target) -> bool:
        return target.backend == "cpu"

    def hash(self) -> str:
        return "specattn-interpreter"

    def parse_options(self, options: dict) -> object:
        raise RuntimeError(_ESCAPED)

    def add_stages(self, stages: dict, options: object, language) -> None:
        raise RuntimeError(_ESCAPED)

    def load_dialects(self, context) -> None:
        raise RuntimeError(_ESCAPED)

    def get_module_map(self) -> dict:
        return {}
