"""Everything that reads or writes S3, and folders that outlive the machine.

`s3` is the client: objects, retries, error texts. `workspace` is a folder of files, local or in S3, `lock` lets one
process at a time work in it. `mirror` gives trainables local copies of S3 sources, `mirror_space` makes room for them.
`files` writes files atomically and computes digests; `provenance` says which code a run is made with.
"""
