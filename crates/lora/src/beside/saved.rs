//! `modules_to_save`: parts of the base that are trained as a whole.

use crate::target::nearest_end;
use ferrotune_core::adapter::Site;
use ferrotune_core::{Error, Result};

/// The sites that `names` mean, in the order of `sites`.
///
/// As in PEFT, a name means every module whose path ends with it, at a dot or not (`norm` means
/// `model.norm` and every `input_layernorm`), and with a module everything inside it.
///
/// # Errors
/// [`Error::Config`] for a name that means nothing, with the nearest one.
///
/// # Source
/// PEFT's `_set_trainable`.
pub(crate) fn sites<'a>(sites: &'a [Site], names: &[String]) -> Result<Vec<&'a Site>> {
    let hits = |name: &str, site: &Site| means(name, &site.name);
    for name in names {
        if name.is_empty() || !sites.iter().any(|site| hits(name, site)) {
            let all = sites.iter().map(|site| site.name.as_str());
            return Err(Error::config(
                "modules_to_save",
                format!(
                    "entry `{name}` matches no module{}; an entry is the end of a module's path, \
                     such as lm_head",
                    nearest_end(name, all)
                ),
            ));
        }
    }
    Ok(sites
        .iter()
        .filter(|site| names.iter().any(|name| hits(name, site)))
        .collect())
}

/// Whether `name` means a module called so, or one that it lies in.
pub(crate) fn means(name: &str, module: &str) -> bool {
    modules_of(module).any(|path| path.ends_with(name))
}

/// Whether a module called so is left out of the adapted ones, because `names` train it: a whole
/// segment of its path is one of them.
///
/// # Source
/// PEFT's `check_target_module_exists`, which reads the names as regular expressions.
pub(crate) fn shadows(names: &[String], module: &str) -> bool {
    names.iter().any(|name| {
        modules_of(module).any(|path| {
            path.strip_suffix(name.as_str())
                .is_some_and(|head| head.is_empty() || head.ends_with('.'))
        })
    })
}

/// A path and those of the modules it lies in, from the outermost on.
fn modules_of(path: &str) -> impl Iterator<Item = &str> {
    let dots = path.match_indices('.').map(|(dot, _)| dot);
    dots.chain([path.len()]).map(|end| &path[..end])
}
