// Products of small matrices of floats that lie in the cache, in tiles whose sums stay in registers. Rows of a right
// matrix and of the sums are whole vectors. A source that includes itself once a width includes this file there too.

#ifdef WIDTH

#include "vectors.h"

BEGIN_WIDTH

// Rows of a tile; with two vectors of each there are registers for the sums.
#if WIDTH == 16
constexpr int TILE_ROWS = 8;
#else
constexpr int TILE_ROWS = 4;
#endif

// Adds left times right to a tile's sums: `count` columns of `left`, as many rows of `right`. Both point to where the
// tile's rows and columns begin. TRANSPOSED: a column of `left` lies side by side.
template <bool TRANSPOSED, int ROWS, int VECS>
INLINE void multiply(V (&sums)[ROWS][VECS], const float *left, int64_t left_stride, const float *right,
                     int64_t right_stride, int64_t count) {
    for (int64_t k = 0; k < count; k++) {
        V of_right[VECS];
        for (int v = 0; v < VECS; v++) of_right[v] = load(right + k * right_stride + v * WIDTH);
        for (int row = 0; row < ROWS; row++) {
            const float factor = TRANSPOSED ? left[k * left_stride + row] : left[row * left_stride + k];
            for (int v = 0; v < VECS; v++) sums[row][v] += factor * of_right[v];
        }
    }
}

template <int VECS, class Tile>
INLINE void go_down(const Tile &tile, int64_t row, int64_t end, int64_t column) {
    for (; row + TILE_ROWS <= end; row += TILE_ROWS) tile.template at<TILE_ROWS, VECS>(row, column);
    if (TILE_ROWS > 4 && row + 4 <= end) {
        tile.template at<4, VECS>(row, column);
        row += 4;
    }
    if (row + 2 <= end) {
        tile.template at<2, VECS>(row, column);
        row += 2;
    }
    if (row < end) tile.template at<1, VECS>(row, column);
}

// Calls tile.at<rows, vectors>(row, column) for tiles that have the rows `first` to `end` and whole vectors of the
// columns `column` to `last_column`.
template <class Tile>
INLINE void for_tiles(const Tile &tile, int64_t first, int64_t end, int64_t column, int64_t last_column) {
    for (; column + 2 * WIDTH <= last_column; column += 2 * WIDTH) go_down<2>(tile, first, end, column);
    for (; column < last_column; column += WIDTH) go_down<1>(tile, first, end, column);
}

// The transpose of (rows, columns). What `to` has beyond the rows, up to WIDEST of them, becomes zero.
static void transpose_into(float *to, int64_t to_stride, const float *from, int64_t from_stride, int64_t rows,
                           int64_t columns) {
    for (int64_t row = 0; row < divide_up(rows, WIDEST) * WIDEST; row += WIDTH)
        for (int64_t column = 0; column < columns; column += WIDTH) {
            V square[WIDTH];
            for (int64_t j = 0; j < WIDTH; j++) {
                const float *at = from + (row + j) * from_stride + column;
                square[j] = row + j < rows ? read_float(at, columns - column) : V{};
            }
            transpose(square);
            for (int64_t j = 0; j < WIDTH && column + j < columns; j++)
                store(to + (column + j) * to_stride + row, square[j]);
        }
}
// And back: (rows, columns) as it is outside, from its transpose with rows of whole vectors.
static void transpose_back(float *to, const float *from, int64_t from_stride, int64_t rows, int64_t columns) {
    for (int64_t row = 0; row < rows; row += WIDTH)
        for (int64_t column = 0; column < columns; column += WIDTH) {
            V square[WIDTH];
            for (int64_t j = 0; j < WIDTH; j++)
                square[j] = column + j < columns ? load(from + (column + j) * from_stride + row) : V{};
            transpose(square);
            for (int64_t j = 0; j < WIDTH && row + j < rows; j++)
                write_float(to + (row + j) * columns + column, square[j], columns - column);
        }
}

END_WIDTH

#endif
