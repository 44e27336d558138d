"""What `bench`, `evaluation` and `calibrate` share, and nothing that serves.

arguments.py   arguments that several commands have
engines.py     engines in processes of their own, and how far a run of several is
interrupts.py  Ctrl-C and SIGTERM, and by which command a run goes on
models.py      shapes of well-known pairs, and the folders that an engine loads them from
outputs.py     files that commands write, and tables
provenance.py  machine, versions, commit, date and command
"""
