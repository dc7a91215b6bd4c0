//! Ranks that a weight has room for.

use ferrotune_core::adapter::Site;
use ferrotune_core::{Error, Result};

/// Refuses a rank above both dimensions of the weight at `site`: more is trained than the weight has, for the same
/// updates. `others` says what else to do about it, such as ", or a `rank_pattern` for this module".
///
/// # Errors
/// [`Error::Config`] under `key`.
pub fn require_rank(key: &str, site: &Site, rank: usize, others: &str) -> Result<()> {
    let [rows, columns] = [site.out_features, site.in_features];
    if rank <= rows.max(columns) {
        return Ok(());
    }
    let message = format!(
        "is {rank}, but the weight of `{}` is {rows} x {columns}: no update of it has a rank above {}; take a smaller \
         one{others}",
        site.name,
        rows.min(columns)
    );
    Err(Error::config(key, message))
}
