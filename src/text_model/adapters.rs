//! Several adapters over one base that is read once: added, exchanged and taken away while it stays where it is.

use super::{Loaded, TextModel, tokenizer};
use ferrotune_core::adapter::{Attachment, SiteId};
use ferrotune_core::io::ModelFiles;
use ferrotune_core::model::{LoadedBase, ModelPlan, Quantise, SharedBase};
use ferrotune_core::params::FlatBuffer;
use ferrotune_core::trainer::attach;
use ferrotune_core::{Error, Result, suggest};
use ferrotune_kernels::Device;
use ferrotune_lora::AdapterBase;
use std::path::Path;

impl TextModel {
    /// Reads the model in `base` once and adapters beside one another, each with a name. The first is active.
    ///
    /// # Errors
    /// As [`TextModel::load_as`] and [`TextModel::add_adapter`].
    pub fn load_together<'a>(
        device: &Device,
        base: &Path,
        adapters: impl IntoIterator<Item = (&'a str, &'a Path)>,
        quantise: Option<Quantise>,
    ) -> Result<Self> {
        let mut model = Self::load_as(device, base, None, quantise)?;
        for (name, directory) in adapters {
            model.add_adapter(name, directory)?;
        }
        if model.adapters.len() > 1 {
            // The base alone.
            model.adapters.remove(0);
        }
        Ok(model)
    }

    /// Names of the adapters, in the order in which questions count them; an empty one is the base alone.
    pub fn adapters(&self) -> impl Iterator<Item = &str> {
        self.adapters.iter().map(|adapter| adapter.name.as_str())
    }

    /// Reads one more adapter, behind those that are there. The base is not read again.
    ///
    /// # Errors
    /// [`Error::Adapter`] for one that does not fit the base or cannot stand beside others (anything but updates of
    /// linears inside the layers), [`Error::Config`] for a name that is taken and for a model that was loaded with an
    /// adapter of its own; what was there stays.
    pub fn add_adapter(&mut self, name: &str, directory: &Path) -> Result<()> {
        if self.adapters().any(|taken| taken == name) {
            let message = format!("`{name}` is the name of two adapters; give one another");
            return Err(Error::config("adapter", message));
        }
        let (attachments, params) = self.read(directory)?;
        let tokenizer = tokenizer(&self.base, Some(directory))?;
        let number = self.model.add_adapter(attachments);
        self.adapters.push(Loaded {
            name: name.to_owned(),
            number: Some(number.map_err(|e| e.of_adapter(directory))?),
            params,
            tokenizer,
        });
        Ok(())
    }

    /// Exchanges the adapter `name` for another one, which is read whole before the old one goes. Questions that are
    /// asked from now on go to the new one.
    ///
    /// # Errors
    /// As [`TextModel::add_adapter`], and [`Error::Config`] for a name that no adapter has; the old one stays.
    pub fn replace_adapter(&mut self, name: &str, directory: &Path) -> Result<()> {
        let place = self.place_of(name)?;
        let (attachments, params) = self.read(directory)?;
        let tokenizer = tokenizer(&self.base, Some(directory))?;
        let number = match self.adapters[place].number {
            None => self.model.add_adapter(attachments),
            Some(number) => (self.model.replace_adapter(number, attachments)).map(|()| number),
        };
        self.adapters[place] = Loaded {
            name: name.to_owned(),
            number: Some(number.map_err(|e| e.of_adapter(directory))?),
            params,
            tokenizer,
        };
        Ok(())
    }

    /// Takes an adapter away; the first that is left becomes active if it was.
    ///
    /// # Errors
    /// [`Error::Config`] for a name that no adapter has, and for the last one.
    pub fn remove_adapter(&mut self, name: &str) -> Result<()> {
        let place = self.place_of(name)?;
        if self.adapters.len() == 1 {
            let message = format!("`{name}` is the only one; nothing would be left to answer");
            return Err(Error::config("adapter", message));
        }
        if let Some(number) = self.adapters[place].number {
            self.model.replace_adapter(number, Vec::new())?;
        }
        self.adapters.remove(place);
        self.active = match self.active.cmp(&place) {
            std::cmp::Ordering::Less => self.active,
            std::cmp::Ordering::Equal => 0,
            std::cmp::Ordering::Greater => self.active - 1,
        };
        Ok(())
    }

    /// Makes the adapter `name` the active one.
    ///
    /// # Errors
    /// [`Error::Config`] for a name that no adapter has.
    pub fn set_adapter(&mut self, name: &str) -> Result<()> {
        self.active = self.place_of(name)?;
        Ok(())
    }

    /// The place of an adapter among all.
    ///
    /// # Errors
    /// [`Error::Config`] with the nearest name.
    pub fn place_of(&self, name: &str) -> Result<usize> {
        let place = self.adapters().position(|own| own == name);
        place.ok_or_else(|| {
            let nearest = suggest::did_you_mean(name, self.adapters());
            let all: Vec<&str> = self.adapters().collect();
            let message = format!(
                "no adapter is named `{name}`{nearest}; there are {}",
                all.join(", ")
            );
            Error::config("adapter", message)
        })
    }

    /// What an adapter attaches, and its values.
    fn read(&mut self, directory: &Path) -> Result<(Vec<(SiteId, Attachment)>, FlatBuffer)> {
        let of_adapter = |e: Error| e.of_adapter(directory);
        if !self.together {
            let message = "the model was loaded with an adapter of its own; load adapters beside one another, or the base \
                           alone, to add some";
            return Err(Error::config("adapter", message));
        }
        let config = self.model.config().clone();
        let files = ModelFiles::open(&self.base)?;
        let method = ferrotune_lora::load(directory, &config)?;
        if method.decoder(config.clone()).map_err(of_adapter)? != config {
            let message = "another stack of layers than the base has cannot stand beside other adapters; use it alone";
            return Err(of_adapter(Error::config("layer_replication", message)));
        }
        let (attachments, mut params) = attach(&config, method.as_ref()).map_err(of_adapter)?;
        let sites = ModelPlan::new(&config).sites;
        let own = AdapterBase::new(&files, directory, &sites, params.layout())?;
        if let Some(table) = own.tables().keys().next() {
            let message = format!(
                "brings its own `{table}`, and the base is one for all adapters beside one another; use it alone"
            );
            return Err(Error::adapter(directory, message));
        }
        params.move_to(self.model.device());
        let mut base = SharedBase(LoadedBase {
            model: &mut self.model,
            source: &files,
        });
        method.prepare(&mut params, &mut base).map_err(of_adapter)?;
        method.load(&mut params, directory)?;
        Ok((attachments, params))
    }
}
