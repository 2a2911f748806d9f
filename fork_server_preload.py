"""Imported once by the fork server, before it forks its first child."""

import os

# Out of the terminal's process group: a signal to the group is for the search process, which tells
# its trials. A fork server that died of it would take the news of its children's ends along.
os.setsid()

import worker  # noqa: E402, F401  (with torch; importing it touches no device)
