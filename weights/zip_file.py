"""Records of a zip file, found in its memory map: what torch's files and NumPy's .npz share."""

import struct
import zipfile

LOCAL_HEADER = struct.Struct("<4s22xHH")
_ENCRYPTED = 1


def record_start(buffer, record: zipfile.ZipInfo) -> int:
    """Where a stored record's bytes begin in the mapped file. Raises ValueError, also for a compressed record.

    The local header is asked: its padding is not in the directory.
    """
    if record.flag_bits & _ENCRYPTED:
        raise ValueError(f"record {record.filename!r} is encrypted")
    if record.compress_type != zipfile.ZIP_STORED or record.compress_size != record.file_size:
        raise ValueError(
            f"record {record.filename!r} is compressed and cannot be mapped; save it with torch.save, or with "
            "np.savez or mx.savez"
        )
    begin = record.header_offset
    header = buffer[begin : begin + LOCAL_HEADER.size] if begin >= 0 else b""
    if len(header) < LOCAL_HEADER.size or header[:4] != b"PK\x03\x04":
        raise ValueError(f"record {record.filename!r} has no local header at byte {begin}")
    _, name_length, extra_length = LOCAL_HEADER.unpack(header)
    start = begin + LOCAL_HEADER.size + name_length + extra_length
    if start + record.file_size > len(buffer):
        raise ValueError(f"record {record.filename!r} runs past the end of the file")
    return start
