//! A digest that tells one data set from another.

use crate::Result;
use crate::data::Examples;

/// BLAKE3, in hexadecimal, over the tokens and labels of all examples, in their order.
///
/// # Errors
/// [`crate::Error::Read`] if they lie in a file that cannot be read.
pub fn data_digest(examples: &Examples) -> Result<String> {
    let mut hasher = blake3::Hasher::new();
    let mut bytes = Vec::new();
    examples.for_each(|_, example| {
        bytes.clear();
        bytes.extend_from_slice(&(example.len() as u64).to_le_bytes());
        bytes.extend(example.input_ids.iter().flat_map(|v| v.to_le_bytes()));
        bytes.extend(example.labels.iter().flat_map(|v| v.to_le_bytes()));
        hasher.update(&bytes);
        Ok(())
    })?;
    Ok(hasher.finalize().to_hex().to_string())
}
