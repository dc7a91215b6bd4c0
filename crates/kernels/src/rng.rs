//! Counter-based random numbers: every draw is a pure function of a key and a counter.
//!
//! Nothing has to be saved in a checkpoint, and the result does not depend on the number of
//! threads, the split into micro-batches or the order of evaluation.
//!
//! # Source
//! Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3" (2011), Philox-4x32-10.

/// Philox-4x32 with ten rounds: four words from a counter and a key.
#[inline(always)]
#[must_use]
pub fn philox4x32(mut counter: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    for _ in 0..10 {
        let p0 = u64::from(counter[0]) * 0xd251_1f53;
        let p1 = u64::from(counter[2]) * 0xcd9e_8d57;
        counter = [
            (p1 >> 32) as u32 ^ counter[1] ^ key[0],
            p1 as u32,
            (p0 >> 32) as u32 ^ counter[3] ^ key[1],
            p0 as u32,
        ];
        key = [
            key[0].wrapping_add(0x9e37_79b9),
            key[1].wrapping_add(0xbb67_ae85),
        ];
    }
    counter
}

/// Mixes two words into one (the finaliser of splitmix64): derives a key from a key and a name.
#[must_use]
pub fn mix(a: u64, b: u64) -> u64 {
    let mut z = a
        .wrapping_add(0x9e37_79b9_7f4a_7c15)
        .wrapping_add(b.rotate_left(32));
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9 ^ (b << 1));
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// A 64-bit key from a seed and a name (FNV-1a, then [`mix`]).
#[must_use]
pub fn key_for(seed: u64, name: &str) -> u64 {
    let hash = name.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |h, b| {
        (h ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3)
    });
    mix(seed, hash)
}

/// A stream of numbers under one key; its position is the only state.
#[derive(Clone, Debug)]
pub struct Stream {
    key: u64,
    next: u64,
}

impl Stream {
    /// The stream of `key`, from its beginning.
    #[must_use]
    pub fn new(key: u64) -> Self {
        Self { key, next: 0 }
    }

    /// 64 random bits.
    pub fn bits(&mut self) -> u64 {
        let block = self.next / 2;
        let words = philox4x32(
            [block as u32, (block >> 32) as u32, 0, 0],
            [self.key as u32, (self.key >> 32) as u32],
        );
        let at = (self.next % 2) as usize * 2;
        self.next += 1;
        u64::from(words[at]) << 32 | u64::from(words[at + 1])
    }

    /// Uniform in `[0, 1)`, 53 bits.
    pub fn uniform(&mut self) -> f64 {
        (self.bits() >> 11) as f64 / (1u64 << 53) as f64
    }

    /// Uniform in `0..n` (Lemire's multiply-shift; the bias is below 2^-40 for `n < 2^24`).
    pub fn below(&mut self, n: usize) -> usize {
        ((u128::from(self.bits()) * n as u128) >> 64) as usize
    }

    /// Standard normal (Box-Muller).
    pub fn normal(&mut self) -> f64 {
        let radius = (-2.0 * (1.0 - self.uniform()).ln()).sqrt();
        radius * (std::f64::consts::TAU * self.uniform()).cos()
    }

    /// Shuffles in place (Fisher-Yates).
    pub fn shuffle<T>(&mut self, items: &mut [T]) {
        for i in (1..items.len()).rev() {
            items.swap(i, self.below(i + 1));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn philox_matches_the_published_vectors() {
        // Random123's known-answer tests, kat_vectors: philox4x32 10.
        assert_eq!(
            philox4x32([0; 4], [0; 2]),
            [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]
        );
        assert_eq!(
            philox4x32([u32::MAX; 4], [u32::MAX; 2]),
            [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]
        );
    }

    #[test]
    fn shuffle_is_a_permutation_and_repeats() {
        let mut a: Vec<u32> = (0..1000).collect();
        let mut b = a.clone();
        Stream::new(7).shuffle(&mut a);
        Stream::new(7).shuffle(&mut b);
        assert_eq!(a, b);
        let mut sorted = a.clone();
        sorted.sort_unstable();
        assert_eq!(sorted, (0..1000).collect::<Vec<_>>());
        assert_ne!(a, sorted);
    }

    #[test]
    fn normal_has_unit_variance() {
        let mut stream = Stream::new(1);
        let n = 20_000;
        let draws: Vec<f64> = (0..n).map(|_| stream.normal()).collect();
        let mean = draws.iter().sum::<f64>() / n as f64;
        let var = draws.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / n as f64;
        assert!(
            mean.abs() < 0.03 && (var - 1.0).abs() < 0.05,
            "{mean} {var}"
        );
    }
}
