"""What `bench`, `evaluation` and `calibrate` share, and nothing that serves.

arguments.py   arguments that several commands have
interrupts.py  Ctrl-C and SIGTERM, and by which command a run goes on
markdown.py    tables
models.py      shapes of well-known pairs, and the folders that an engine loads them from
outputs.py     files that commands write
provenance.py  machine, versions, commit, date and command
remaining.py   how far a run is
"""
