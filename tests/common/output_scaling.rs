//! A method from outside, which computes on the host, as the own method of the examples does.

use ferrotune::core::Result;
use ferrotune::core::adapter::{Adapter, Attachment, CustomLinear, Site, SiteId};
use ferrotune::core::params::{FlatBuffer, ParamId, ParamLayoutBuilder, ParamSpec};
use ferrotune::kernels::{Tensor, View, ViewMut};
use std::path::Path;

/// Scales outputs of some linears.
#[derive(Debug)]
pub(crate) struct OutputScaling;

#[derive(Debug)]
struct Scale(ParamId);

fn scaled(values: &[f32], scale: &[f32]) -> Vec<f32> {
    let rows = values.chunks_exact(scale.len());
    rows.flat_map(|row| row.iter().zip(scale).map(|(v, s)| v * s))
        .collect()
}

impl CustomLinear for Scale {
    fn forward(&self, params: &FlatBuffer, _x: View<'_>, y: ViewMut<'_>) -> Result<Vec<Tensor>> {
        let [tokens, out] = y.shape();
        let base = y.as_view().to_f32_vec();
        let values = scaled(&base, params.get(self.0));
        y.copy_from(View::from_f32(&values, tokens, out));
        Ok(vec![Tensor::from_f32(base, tokens, out)])
    }

    fn backward(
        &self,
        params: &FlatBuffer,
        grads: &mut FlatBuffer,
        _x: View<'_>,
        saved: &[Tensor],
        dy: ViewMut<'_>,
        _dx: Option<ViewMut<'_>>,
    ) -> Result<()> {
        let [tokens, out] = dy.shape();
        let (d, base) = (dy.as_view().to_f32_vec(), saved[0].to_f32_vec());
        for (d, base) in d.chunks_exact(out).zip(base.chunks_exact(out)) {
            let sums = grads.get_mut(self.0).iter_mut();
            sums.zip(d.iter().zip(base))
                .for_each(|(s, (d, b))| *s += d * b);
        }
        let values = scaled(&d, params.get(self.0));
        dy.copy_from(View::from_f32(&values, tokens, out));
        Ok(())
    }
}

impl Adapter for OutputScaling {
    fn attach(
        &self,
        sites: &[Site],
        params: &mut ParamLayoutBuilder,
    ) -> Result<Vec<(SiteId, Attachment)>> {
        let chosen = |site: &&Site| {
            let targets = ["k_proj", "up_proj", "down_proj"];
            targets.iter().any(|t| site.name.ends_with(t))
        };
        let attach = |site: &Site| {
            let name = format!("{}.scale", site.name);
            let spec = ParamSpec::new(name, [site.out_features], site.execution_order);
            (
                site.id,
                Attachment::Custom(Box::new(Scale(params.add(spec)))),
            )
        };
        Ok(sites.iter().filter(chosen).map(attach).collect())
    }

    fn init(&self, _: &mut FlatBuffer, _: u64) -> Result<()> {
        Ok(())
    }

    fn save(&self, _: &FlatBuffer, _: &Path) -> Result<()> {
        unreachable!("nothing is saved here")
    }

    fn load(&self, _: &mut FlatBuffer, _: &Path) -> Result<()> {
        unreachable!("nothing is loaded here")
    }

    fn describe(&self) -> String {
        "output scaling".into()
    }
}
