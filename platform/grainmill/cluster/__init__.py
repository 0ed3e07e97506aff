"""Connections to Ray clusters, their present and possible size, and the submission of jobs to them.

`session` connects; `shape` reads cluster files; `capacity` counts the trials that fit; `submission` packs and sends a
job; `ray_private` holds every use of Ray's private interfaces.
"""
