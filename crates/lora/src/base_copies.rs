//! Copies of base weights that PEFT saves beside an adapted embedding or head, and of biases beside modules trained as
//! a whole.
//!
//! PEFT loads them into the base. Where they are the base's own values, that changes nothing; where the
//! adapter was trained on another table, as after a resize, its base here would be the wrong one.

use crate::files::Weights;
use crate::lora::names::{self, Part};
use ferrotune_core::io::ModelFiles;
use ferrotune_core::{Error, Result};
use std::path::Path;

/// Refuses the adapter in `directory` if it holds a base weight that `base` has otherwise.
///
/// # Errors
/// [`Error::Adapter`] naming the tensor; [`Error::Read`].
pub fn check(directory: &Path, base: &ModelFiles) -> Result<()> {
    let weights = Weights::open(directory)?;
    for name in weights.file.names() {
        let own = match names::parse(name) {
            Some((module, Part::AdaptedWeight)) => format!("{module}.weight"),
            Some((module, Part::Bias)) => match module.strip_suffix(names::ORIGINAL) {
                Some(module) => format!("{module}.bias"),
                None => continue,
            },
            _ => continue,
        };
        // A head that is tied has no tensor of its own.
        let Some(meta) = base.meta(&own) else {
            continue;
        };
        let copy = weights.read(name, &meta.shape)?;
        let same = |(a, b): (&f32, &f32)| a.to_bits() == b.to_bits();
        if !copy.iter().zip(&base.read_f32(&own)?).all(same) {
            return Err(Error::adapter(
                &weights.path,
                format!(
                    "`{name}` is the weight of the base that the adapter was trained on, and this base's \
                     `{own}` has other values; give that base"
                ),
            ));
        }
    }
    Ok(())
}
