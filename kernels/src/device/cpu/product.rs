//! A matrix product whose right side has contiguous rows.

use super::simd::Simd;

/// The left side, with its strides.
#[derive(Clone, Copy)]
pub(super) struct Left<'a> {
    pub(super) values: &'a [f32],
    /// From one row to the next.
    pub(super) row: usize,
    /// From one column to the next.
    pub(super) column: usize,
}

/// `out[m][n] = sum over k of left[m][k] * right[k][n]`, added to `out` when `ADD`. `out` has as many rows as fit: a multiple of 8; `right`
/// is `[inner][width]`, and `width` a multiple of 32. Each element is summed in the order of k.
#[inline(always)]
pub(super) fn product<S: Simd, const ADD: bool>(simd: S, left: Left, right: &[f32], out: &mut [f32], inner: usize, width: usize) {
    if S::PRODUCT_ROWS == 8 {
        product_by::<S, ADD, 8>(simd, left, right, out, inner, width);
    } else {
        product_by::<S, ADD, 2>(simd, left, right, out, inner, width);
    }
}

#[inline(always)]
fn product_by<S: Simd, const ADD: bool, const R: usize>(simd: S, left: Left, right: &[f32], out: &mut [f32], inner: usize, width: usize) {
    let rows = out.len() / width;
    assert!(rows.is_multiple_of(8) && width.is_multiple_of(32) && out.len() == rows * width && right.len() == inner * width);
    assert!(left.values.len() > (rows - 1) * left.row + (inner - 1) * left.column);
    for n in (0..width).step_by(32) {
        for m in (0..rows).step_by(R) {
            let mut sums = [[simd.splat(0.0); 2]; R];
            // SAFETY: all indices are below the lengths asserted above; the last row of a tile is below `rows`, a multiple of R.
            unsafe {
                let from = left.values.as_ptr().add(m * left.row);
                for k in 0..inner {
                    let right = right.as_ptr().add(k * width + n);
                    let columns = [simd.load(right), simd.load(right.add(16))];
                    for (row, sums) in sums.iter_mut().enumerate() {
                        let value = simd.splat(*from.add(row * left.row + k * left.column));
                        sums[0] = simd.mul_add(value, columns[0], sums[0]);
                        sums[1] = simd.mul_add(value, columns[1], sums[1]);
                    }
                }
                for (row, sums) in sums.into_iter().enumerate() {
                    let to = out.as_mut_ptr().add((m + row) * width + n);
                    for (half, sum) in sums.into_iter().enumerate() {
                        let to = to.add(half * 16);
                        simd.store(to, if ADD { simd.add(simd.load(to), sum) } else { sum });
                    }
                }
            }
        }
    }
}
