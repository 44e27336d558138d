"""`specattn report`: reports of evaluations and of speed as one HTML page.

command.py  the command line, and the page around the sections
quality.py  the section of a report of quality, with the pictures of charts.py
speed.py    the section of a report of speed
templates/  the page, its style and its script
"""
