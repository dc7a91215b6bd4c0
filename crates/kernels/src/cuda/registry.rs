//! Every module of kernels, for what compiles or lists them all.

use super::Module;
use crate::attention::cuda::{HOPPER_MODULES as HOPPER_ATTENTION, MODULES as ATTENTION};

/// One line per module, by operation.
static MODULES: &[&Module] = &[
    &crate::activation::cuda::MODULE,
    &crate::adamw::cuda::MODULE,
    &ATTENTION[0].1,
    &ATTENTION[1].1,
    &ATTENTION[2].1,
    &ATTENTION[3].1,
    &HOPPER_ATTENTION[0].1,
    &HOPPER_ATTENTION[1].1,
    &crate::augmented_linear::cuda::MODULE,
    &crate::axpby::cuda::MODULE,
    &crate::bias::cuda::MODULE,
    &crate::block_diagonal::cuda::MODULE,
    &crate::circulant::cuda::MODULE,
    &crate::copy::cuda::MODULE,
    &crate::dequantise::cuda::MODULE,
    &crate::directions::cuda::MODULE,
    &crate::dora::cuda::MODULE,
    &crate::dropout::cuda::MODULE,
    &crate::embedding::cuda::MODULE,
    &crate::hadamard::cuda::MODULE,
    &crate::identity_distance::cuda::MODULE,
    &crate::int8_linear::cuda::MODULE,
    &crate::khatri_rao::cuda::MODULE,
    &crate::kronecker::cuda::MODULE,
    &crate::layer_norm::cuda::MODULE,
    &crate::linear_cross_entropy::cuda::MODULE,
    &crate::noise::cuda::MODULE,
    &crate::norm_product::cuda::MODULE,
    &crate::optimizer::cuda::MODULE,
    &crate::pair_rotation::cuda::MODULE,
    &crate::parts::cuda::MODULE,
    &crate::qk_norm::cuda::MODULE,
    &crate::rms_norm::cuda::MODULE,
    &crate::rope::cuda::MODULE,
    &crate::rotation::cuda::MODULE,
    &crate::vector_bank::cuda::MODULE,
];

/// Every module that an operation launches kernels of, by operation.
#[must_use]
pub fn modules() -> &'static [&'static Module] {
    MODULES
}

impl Module {
    /// The one architecture it is for, where its source has a line `// only ARCHITECTURE`.
    fn only(&self) -> Option<&'static str> {
        let mut lines = self.source.lines();
        lines.find_map(|line| line.strip_prefix("// only "))
    }

    /// Whether it compiles for `arch`, like `sm_90a`.
    #[must_use]
    pub fn is_for(&self, arch: &str) -> bool {
        self.only().is_none_or(|only| only == arch)
    }

    /// The names of the kernels, in the order of the source.
    pub fn kernels(&self) -> impl Iterator<Item = &'static str> {
        self.source.lines().filter_map(|line| {
            let (name, _) = line.strip_prefix("KERNEL(")?.split_once(',')?;
            Some(name.trim())
        })
    }
}

#[cfg(test)]
mod tests {
    use super::modules;
    use std::collections::BTreeSet;
    use std::fs;
    use std::path::Path;

    /// Every `.cu` under `folder`, as path and text, but for those of tests.
    fn sources(folder: &Path, found: &mut Vec<(String, String)>) {
        for entry in fs::read_dir(folder).expect("the sources are there") {
            let path = entry.expect("the folder can be listed").path();
            if path.is_dir() && path.file_name().is_some_and(|name| name != "tests") {
                sources(&path, found);
            } else if path.extension().is_some_and(|kind| kind == "cu") {
                let text = fs::read_to_string(&path).expect("the source can be read");
                found.push((path.display().to_string(), text));
            }
        }
    }

    #[test]
    fn every_kernel_source_of_the_tree_is_listed() {
        let mut found = Vec::new();
        let tree = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
        sources(&tree, &mut found);
        assert!(found.len() > 5, "{} sources found", found.len());
        for (path, text) in found {
            assert!(
                modules().iter().any(|module| module.source.contains(&text)),
                "{path}: no module in cuda/registry.rs has this source"
            );
        }
    }

    #[test]
    fn modules_have_unique_names_and_kernels() {
        let names: BTreeSet<&str> = modules().iter().map(|module| module.name).collect();
        assert_eq!(names.len(), modules().len(), "{names:?}");
        for module in modules() {
            let kernels: Vec<&str> = module.kernels().collect();
            let unique: BTreeSet<&str> = kernels.iter().copied().collect();
            assert!(!kernels.is_empty(), "{} has no KERNEL line", module.name);
            assert_eq!(kernels.len(), unique.len(), "{}", module.name);
        }
    }
}
