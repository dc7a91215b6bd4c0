use crate::{Result, View, ViewMut, matmul};

pub(super) fn product(mut y: ViewMut<'_>, x: View<'_>, blocks: View<'_>) -> Result<()> {
    let n = blocks.cols();
    for first in (0..blocks.rows()).step_by(n) {
        let columns = || first..first + n;
        let y = y.reborrow().columns(columns());
        matmul::nt(
            y,
            0.0,
            1.0,
            x.columns(columns()),
            blocks.row_range(columns()),
        )?;
    }
    Ok(())
}

pub(super) fn gradient(mut d_blocks: ViewMut<'_>, dy: View<'_>, x: View<'_>) -> Result<()> {
    let n = d_blocks.cols();
    for first in (0..d_blocks.rows()).step_by(n) {
        let columns = || first..first + n;
        let d = d_blocks.reborrow().row_range(columns());
        matmul::tn(d, 0.0, 1.0, dy.columns(columns()), x.columns(columns()))?;
    }
    Ok(())
}
