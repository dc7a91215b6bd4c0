//! What a rank says of an exchange before it: every rank must say the same.

use std::fmt;

/// What an exchange does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Operation {
    AllReduce = 1,
    AllGather = 2,
    Broadcast = 3,
}

impl Operation {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::AllReduce => "all_reduce",
            Self::AllGather => "all_gather",
            Self::Broadcast => "broadcast",
        }
    }

    fn from_byte(byte: u8) -> Option<Self> {
        [Self::AllReduce, Self::AllGather, Self::Broadcast]
            .into_iter()
            .find(|op| *op as u8 == byte)
    }

    /// The element type that goes over the wire.
    fn dtype(self) -> DType {
        match self {
            Self::AllGather => DType::Bytes,
            Self::AllReduce | Self::Broadcast => DType::F32,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
enum DType {
    F32 = 1,
    Bytes = 2,
}

/// One exchange, as one rank asks for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Call {
    /// Exchanges before this one.
    pub(super) sequence: u64,
    /// The optimizer step that was begun last.
    pub(super) step: Option<u64>,
    pub(super) operation: Operation,
    dtype: DType,
    /// f64 totals that come along.
    pub(super) totals: u64,
    /// Bytes of the payload of this rank.
    pub(super) bytes: u64,
}

impl Call {
    pub(super) const LENGTH: usize = 40;
    const MAGIC: [u8; 4] = *b"FTCL";
    const NO_STEP: u64 = u64::MAX;

    pub(super) fn new(
        sequence: u64,
        step: Option<u64>,
        operation: Operation,
        totals: usize,
        bytes: usize,
    ) -> Self {
        Self {
            sequence,
            step,
            operation,
            dtype: operation.dtype(),
            totals: totals as u64,
            bytes: bytes as u64,
        }
    }

    pub(super) fn encode(&self) -> [u8; Self::LENGTH] {
        let mut to = [0; Self::LENGTH];
        to[..4].copy_from_slice(&Self::MAGIC);
        to[4] = self.operation as u8;
        to[5] = self.dtype as u8;
        // Values travel as they lie in memory; a rank of the other byte order is told apart here.
        to[6..8].copy_from_slice(&1u16.to_ne_bytes());
        let step = self.step.unwrap_or(Self::NO_STEP);
        for (i, word) in [self.sequence, step, self.totals, self.bytes]
            .iter()
            .enumerate()
        {
            to[8 + 8 * i..16 + 8 * i].copy_from_slice(&word.to_le_bytes());
        }
        to
    }

    /// `None` if these bytes are no call, or one in another byte order.
    pub(super) fn decode(from: &[u8]) -> Option<Self> {
        let (head, words) = from.get(..Self::LENGTH)?.split_at(8);
        let operation = Operation::from_byte(head[4])?;
        let dtype = [DType::F32, DType::Bytes]
            .into_iter()
            .find(|d| *d as u8 == head[5])?;
        if head[..4] != Self::MAGIC || head[6..8] != 1u16.to_ne_bytes() {
            return None;
        }
        let mut words = words.chunks_exact(8).map(|word| {
            let mut bytes = [0; 8];
            bytes.copy_from_slice(word);
            u64::from_le_bytes(bytes)
        });
        let (sequence, step) = (words.next()?, words.next()?);
        Some(Self {
            sequence,
            step: (step != Self::NO_STEP).then_some(step),
            operation,
            dtype,
            totals: words.next()?,
            bytes: words.next()?,
        })
    }

    /// Whether two ranks ask for the same thing. Only gathered bytes may differ in length.
    pub(super) fn agrees(&self, other: &Self) -> bool {
        let bytes = match self.operation {
            Operation::AllGather => other.bytes,
            Operation::AllReduce | Operation::Broadcast => self.bytes,
        };
        Self { bytes, ..*self } == *other
    }
}

impl fmt::Display for Call {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} (call {}, ", self.operation.name(), self.sequence + 1)?;
        match self.step {
            Some(step) => write!(f, "step {step}")?,
            None => f.write_str("before the first step")?,
        }
        let Self { bytes, totals, .. } = self;
        match self.dtype {
            DType::F32 => write!(f, ") of {} f32 and {totals} totals", bytes / 4),
            DType::Bytes => write!(f, ") of {bytes} bytes"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_call_survives_the_wire_and_nothing_else_is_one() {
        for step in [None, Some(0), Some(7)] {
            let call = Call::new(3, step, Operation::AllReduce, 2, 400);
            let wire = call.encode();
            assert_eq!(Call::decode(&wire), Some(call));
            for byte in 0..8 {
                let mut bad = wire;
                bad[byte] ^= 0x80;
                assert_eq!(Call::decode(&bad), None, "byte {byte}");
            }
        }
    }

    #[test]
    fn only_gathered_bytes_may_differ_in_length() {
        let call = |operation, bytes| Call::new(0, None, operation, 0, bytes);
        assert!(call(Operation::AllGather, 1).agrees(&call(Operation::AllGather, 2)));
        assert!(!call(Operation::Broadcast, 1).agrees(&call(Operation::Broadcast, 2)));
        assert!(!call(Operation::Broadcast, 1).agrees(&call(Operation::AllReduce, 1)));
    }
}
