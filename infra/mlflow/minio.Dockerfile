# MinIO as a user without rights: the image's own user is root, and a new volume belongs to the owner of this folder.
FROM busybox:1.37.0 AS folder
RUN mkdir /data
FROM minio/minio:RELEASE.2025-04-22T22-12-26Z
COPY --from=folder --chown=1000:1000 /data /data
USER 1000:1000
