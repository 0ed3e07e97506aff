"""Experiment file: one frozen, checked object, or every problem with its line number.

`experiment` holds the sections, `space` the search space, `resources` what a trial takes of a cluster, `section` their
base class. `yaml_document` reads and writes YAML, `validation` checks what pydantic cannot.
"""
