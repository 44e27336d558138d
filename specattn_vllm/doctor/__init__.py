"""`specattn doctor`: tries what a server needs, one thing after the other, and says what to do about what fails.

`findings.py` makes the checks. What loads torch or vLLM runs in a process of its own (`probes.py`, `sizes.py`): a crash
or a missing library is then a finding and no traceback. `command.py` prints.
"""
