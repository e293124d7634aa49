"""Messages for errors of the operating system, and their remedies."""

import errno

_REMEDIES = {
  "free some space": (errno.ENOSPC,),
  "delete something, as your quota is used up": (errno.EDQUOT,),
  "write to another disk": (errno.EROFS,),
  "check its permissions": (errno.EACCES, errno.EPERM),
  "choose a shorter name": (errno.ENAMETOOLONG,),
  "check the path": (errno.ENOENT,),
  "a part of the path is a file: check the path": (errno.ENOTDIR,),
  "it is a directory: name a file": (errno.EISDIR,),
  "remove it": (errno.EEXIST, errno.ENOTEMPTY),
  "its symbolic links form a circle: check the path": (errno.ELOOP,),
  "raise the limit of open files (ulimit -n)": (errno.EMFILE, errno.ENFILE),
  "use a file system that holds larger files": (errno.EFBIG,),
  "another program is using it: try again": (errno.EBUSY, errno.ETXTBSY, errno.EAGAIN),
  "the disk or the network failed: try again, and check the disk": (
    errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN, errno.EHOSTDOWN, errno.EHOSTUNREACH,
    errno.ECONNRESET, errno.ECONNREFUSED, errno.ENODEV, errno.ENXIO,
    getattr(errno, "EREMOTEIO", errno.EIO),  # Linux has it
  ),
  "close other programs, or use a machine with more memory": (errno.ENOMEM,),
  "choose another name, as this disk does not support its characters": (

    errno.EILSEQ, errno.EINVAL,
  ),
}  # fmt: skip
_BY_NUMBER = {number: remedy for remedy, numbers in _REMEDIES.items() for number in numbers}


def error_text(error: OSError) -> str:
  """What went wrong, without a full stop: "Is a directory"."""
  return error.strerror or str(error) or type(error).__name__


def reason(error: OSError) -> str:
  """What went wrong and what to do, without a full stop: "Is a directory; name a file"."""
  return f"{error_text(error)}; {remedy(error)}"


def remedy(error: OSError) -> str:
  """What to do, without a full stop."""
  return _BY_NUMBER.get(error.errno or 0, "check the path")
