"""The sizes of pages against those that pyarrow records of whole columns, and headers that are none."""

import io

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jaxdistill.data.parquet_pages import pages


@pytest.mark.parametrize("codec", ["none", "zstd", "snappy"])
@pytest.mark.parametrize("version", ["1.0", "2.0"])
@pytest.mark.parametrize("dictionary", [False, True])
def test_pages_fill_their_column(codec, version, dictionary):
    words = [f"{i % 700} " * (i % 90) for i in range(5000)] + [None, "x" * 70_000]
    file = io.BytesIO()
    pq.write_table(
        pa.table({"n": list(range(len(words))), "text": words}),
        file,
        compression=codec,
        data_page_version=version,
        use_dictionary=dictionary,
        data_page_size=20_000,
        row_group_size=3000,
        write_statistics=True,
        max_rows_per_page=500,
    )
    metadata = pq.read_metadata(file)
    for group in range(metadata.num_row_groups):
        for column in range(2):
            chunk = metadata.row_group(group).column(column)
            start = min(chunk.data_page_offset, chunk.dictionary_page_offset or chunk.data_page_offset)
            found = list(pages(file, start, chunk.total_compressed_size))
            assert sum(page.header + page.stored for page in found) == chunk.total_compressed_size
            assert sum(page.header + page.whole for page in found) == chunk.total_uncompressed_size
            assert len(found) > 3


@pytest.mark.parametrize(
    "data",
    [
        *(b"\0", b"\x15", b"\x15\0\x15", b"\xff" * 99, b"\x1c" * 50_000, b"\x19\xf5\xff\xff\xff\xff\x0f", b"\x1b\x00"),
        *(
            b"\x15\0\x15\x03\x15\x03\0",
            b"\x15\0\x15\x02\x15\xc8\x01\0",
            b"\x18\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01",
        ),
    ],
    ids=lambda data: repr(data[:12]),
)
def test_headers_that_are_none(data):
    with pytest.raises(ValueError, match=r"page"):
        list(pages(io.BytesIO(data), 0, len(data)))
