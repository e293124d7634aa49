"""Files in buckets and on web servers, by URL, with one policy of retries.

  gs://BUCKET/NAME                        Cloud Storage, through gcsfs (extra `gcs`)
  s3://BUCKET/NAME                        S3 and compatible services, through s3fs (extra `s3`)
  hf://datasets/ORG/NAME[@REVISION]/PATH  datasets of the Hugging Face hub (extra `hub`), read only
  https://HOST/PATH                       web servers (extra `https`), read only, if allowed

gcsfs, s3fs and fsspec find the credentials and keep the connections. The requests are ours, since
the interface of fsspec lacks what a job needs: the version of the bytes that were read, writes that
fail if another process was faster, and listings in pages. Its own retries are not used, so that
`retries` is the only policy and counts all requests.

- `urls`: parses URLs, and removes secrets from them.
- `retries`, `faults`: what is tried again, and what errors say.
- `store`: the operations, which `gcs`, `s3`, `web` and `hub` implement.
- `objects`: an object or prefix with the methods of `pathlib` that a job needs.
- `object_lease`: a lease that is an object.
"""
