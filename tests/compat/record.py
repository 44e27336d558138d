"""Records what a vLLM has of what the plugin leans on: python tests/compat/record.py FOLDER_OF_VLLM VERSION

For versions that cannot be installed beside the tests. The folder may be an unpacked wheel.
"""

import json
import sys
from pathlib import Path

from specattn_vllm.compat import leaned_on

folder, version = Path(sys.argv[1]), sys.argv[2]
found = {lean.partition("(")[0]: leaned_on.signature(folder, lean) for lean in leaned_on.LEANED_ON}
Path(__file__).with_name(f"vllm-{version}.json").write_text(json.dumps(found, indent=1) + "\n")
