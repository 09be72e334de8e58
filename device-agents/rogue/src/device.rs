//! The hostile device: one command after the other.

use std::collections::VecDeque;

use iommu_proto::credentials::Credentials;
use iommu_proto::pb;
use iommu_proto::pb::device_to_server::Message as Up;

use crate::bounds::{BATCH_BYTES_MAX, OPERATIONS_MAX, QUEUED_BYTES_MAX, QUEUED_MAX};
use crate::execute::{answer_of_batch, answer_of_one};
use crate::language::{Answer, Behave, Claim, Command, Connect, Counted, Dma, End, Kind, Raw, Status};
use crate::load::Hammering;
use crate::peer::Peer;
use crate::stream::{Stream, hello};

/// What a command comes to when it cannot be done: the session is over, or the command makes no sense.
#[derive(Clone, Debug)]
pub(crate) enum Stopped {
    /// There is no session.
    Ended(End),
    /// It makes no sense.
    Wrong(String),
}

impl From<End> for Stopped {
    fn from(end: End) -> Self {
        Self::Ended(end)
    }
}

/// A sentence about a command that makes no sense.
pub(crate) fn wrong<T>(why: impl Into<String>) -> Result<T, Stopped> {
    Err(Stopped::Wrong(why.into()))
}

/// The device, and all that it remembers.
#[derive(Debug)]
pub struct Device {
    server: String,
    credentials: Credentials,
    stream: Option<Stream>,
    behave: Behave,
    queued: VecDeque<pb::DmaBatch>,
    last_write: Option<pb::DmaBatch>,
    hammer: Option<Hammering>,
}

impl Device {
    /// A device that is not connected.
    pub fn new(server: &str, credentials: Credentials) -> Self {
        Self {
            server: server.to_owned(),
            credentials,
            stream: None,
            behave: Behave::default(),
            queued: VecDeque::new(),
            last_write: None,
            hammer: None,
        }
    }

    /// Does what it is told. `None` for `quit`.
    pub async fn obey(&mut self, command: Command) -> Option<Answer> {
        if command == Command::Quit {
            return None;
        }
        Some(match self.attempt(command).await {
            Ok(answer) => answer,
            Err(Stopped::Ended(end)) => Answer::Ended(end),
            Err(Stopped::Wrong(why)) => Answer::Wrong { why },
        })
    }

    async fn attempt(&mut self, command: Command) -> Result<Answer, Stopped> {
        match command {
            Command::Connect(connect) => self.connect(connect).await,
            Command::Disconnect => {
                self.drop_stream().await;
                Ok(Answer::Well)
            }
            Command::Dma(dma) => self.dma(&dma).await,
            Command::Raw(raw) => {
                let batch = self.raw(&raw)?;
                self.batch(batch).await
            }
            Command::Release => self.release().await,
            Command::Replay => match self.last_write.clone() {
                Some(batch) => self.batch(batch).await,
                None => wrong("nothing was written yet, so there is nothing to repeat"),
            },
            Command::Scan(scan) => self.scan(&scan).await,
            Command::Msi(msi) => self.dma(&Dma::write(msi.address.0, msi.data.0)).await,
            Command::GuessInterrupts(guess) => self.guess_interrupts(&guess).await,
            Command::Hammer(hammer) => {
                let shared = self.stream()?.shared();
                let generation = self.generation(Claim::Current)?;
                if let Some(before) = self.hammer.replace(Hammering::start(shared, hammer, generation)?) {
                    before.stop().await;
                }
                Ok(Answer::Well)
            }
            Command::HammerStop => match self.hammer.take() {
                Some(hammer) => Ok(Answer::Counted(hammer.stop().await)),
                None => wrong("nothing is hammered"),
            },
            Command::Flood(flood) => self.flood(&flood).await.map(Answer::Counted),
            Command::Steady(steady) => self.steady(&steady).await,
            Command::Reading(reading) => {
                self.stream()?.shared().reading.send_replace(reading.on);
                Ok(Answer::Well)
            }
            Command::Behave(behave) => {
                self.behave = behave.clone();
                if let Some(stream) = &self.stream {
                    stream.peer().behave = behave;
                }
                Ok(Answer::Well)
            }
            Command::ResetDone(tag) => {
                let message = self.stream()?.peer().reset_done(tag.tag);
                self.say(message, "no reset is held, and no tag was given").await
            }
            Command::MmioAnswer(answer) => {
                let message = self.stream()?.peer().access_done(answer.tag, Some(answer.value));
                self.say(message, "no register access is held, and no tag was given").await
            }
            Command::Hello(connect) => self.say(Some(Up::Hello(hello(&connect))), "").await,
            Command::Status => Ok(Answer::Status(self.status())),
            Command::Quit => Ok(Answer::Well),
        }
    }

    async fn connect(&mut self, connect: Connect) -> Result<Answer, Stopped> {
        self.drop_stream().await;
        let server = connect.server.clone().unwrap_or_else(|| self.server.clone());
        let peer = Peer::behaving(self.behave.clone());
        let stream = Stream::open(&server, &self.credentials, &connect, peer).await?;
        let welcome = &stream.welcome;
        let answer = Answer::Connected {
            generation: welcome.generation,
            assignment_generation: welcome.assignment_generation,
            dma_credits: welcome.dma_credits,
            batch_operations_max: welcome.batch_operations_max,
            batch_bytes_max: welcome.batch_bytes_max,
        };
        self.stream = Some(stream);
        Ok(answer)
    }

    async fn drop_stream(&mut self) {
        if let Some(hammer) = self.hammer.take() {
            hammer.abandon();
        }
        self.stream = None;
    }

    pub(crate) fn stream(&self) -> Result<&Stream, Stopped> {
        match &self.stream {
            Some(stream) => Ok(stream),
            None => wrong("it is not connected; say connect first"),
        }
    }

    fn status(&self) -> Status {
        let known = self.stream.as_ref().map(|stream| stream.peer().status()).unwrap_or_default();
        let hammered: Option<Counted> = self.hammer.as_ref().map(Hammering::so_far);
        Status { queued: self.queued.len() as u64, hammered, ..known }
    }

    /// Sends a message that is answered by nothing but, perhaps, the end of the stream, and gives that end a moment to come.
    async fn say(&self, message: Option<Up>, without: &str) -> Result<Answer, Stopped> {
        /// A violation is noticed when the message is read: at once, but for a machine under load.
        const MOMENT: std::time::Duration = std::time::Duration::from_millis(100);
        let Some(message) = message else { return wrong(without) };
        let shared = self.stream()?.shared();
        let minded = !matches!(message, Up::ResetDone(_) | Up::Mmio(_));
        shared.tell(message).await?;
        let patience = if minded { crate::bounds::ANSWER_DEADLINE } else { MOMENT };
        match shared.end_within(patience).await {
            Some(end) => Err(end.into()),
            None => Ok(Answer::Well),
        }
    }

    /// The generation that a claim names.
    pub(crate) fn generation(&self, claim: Claim) -> Result<Option<u64>, Stopped> {
        let stream = self.stream()?;
        let truth = stream.peer().status.assignment_generation;
        Ok(match claim {
            Claim::Absent => None,
            Claim::Current => Some(truth),
            Claim::Welcome => Some(stream.welcome.assignment_generation),
            Claim::Told => Some(stream.peer().status.told_generation),
            Claim::Number(number) => Some(number),
            Claim::Ahead(by) => Some(truth.saturating_add_signed(by)),
        })
    }

    async fn dma(&mut self, dma: &Dma) -> Result<Answer, Stopped> {
        let batch = self.one(dma)?;
        if dma.later {
            let bytes: usize = self.queued.iter().chain([&batch]).map(|queued| queued.payload.len()).sum();
            if self.queued.len() == QUEUED_MAX || bytes > QUEUED_BYTES_MAX {
                return wrong(format!(
                    "at most {QUEUED_MAX} batches and {QUEUED_BYTES_MAX} bytes wait; release them first"
                ));
            }
            self.queued.push_back(batch);
            return Ok(Answer::Queued { waiting: self.queued.len() as u64 });
        }
        self.carry(batch).await.map(answer_of_one)
    }

    /// A batch of one operation.
    fn one(&self, dma: &Dma) -> Result<pb::DmaBatch, Stopped> {
        let given = dma.data.as_ref().map_or(0, |data| data.0.len());
        let size = match dma.size {
            Some(size) => size,
            None if dma.kind == Kind::Cas => (given / 2) as u32,
            None => given as u32,
        };
        if size as usize > BATCH_BYTES_MAX || given > BATCH_BYTES_MAX {
            return wrong(format!("size: at most {BATCH_BYTES_MAX} bytes"));
        }
        let payload = match (&dma.data, dma.kind) {
            (_, Kind::Read) => Vec::new(),
            (Some(data), _) => data.0.clone(),
            (None, Kind::Cas) => vec![dma.fill; 2 * size as usize],
            (None, _) => vec![dma.fill; size as usize],
        };
        Ok(pb::DmaBatch {
            first_tag: 0,
            iova: vec![dma.iova.0],
            size_bytes: vec![size],
            kind: vec![dma.kind.code()].into(),
            payload: payload.into(),
            pasid: dma.pasid,
            address_type: dma.address_type,
            assignment_generation: self.generation(dma.generation)?,
        })
    }

    fn raw(&self, raw: &Raw) -> Result<pb::DmaBatch, Stopped> {
        let times = raw.repeat.max(1) as usize;
        let repeated = [raw.iova.len(), raw.kind.0.len()].map(|entries| entries.saturating_mul(times));
        if repeated.into_iter().chain([raw.size.len()]).any(|entries| entries > OPERATIONS_MAX) {
            return wrong(format!("iova, kind, size: at most {OPERATIONS_MAX} operations"));
        }
        if raw.payload.0.len() + raw.zeros as usize > BATCH_BYTES_MAX {
            return wrong(format!("payload: at most {BATCH_BYTES_MAX} bytes"));
        }
        let mut payload = raw.payload.0.clone();
        payload.resize(payload.len() + raw.zeros as usize, 0);
        let addresses: Vec<u64> = raw.iova.iter().map(|iova| iova.0).collect();
        Ok(pb::DmaBatch {
            first_tag: raw.first_tag,
            iova: addresses.repeat(times),
            size_bytes: raw.size.clone(),
            kind: raw.kind.0.repeat(times).into(),
            payload: payload.into(),
            pasid: raw.pasid,
            address_type: raw.address_type,
            assignment_generation: self.generation(raw.generation)?,
        })
    }

    /// Carries out a batch, and tells how it ended.
    async fn batch(&mut self, batch: pb::DmaBatch) -> Result<Answer, Stopped> {
        let operations = batch.iova.len() as u64;
        let completions = self.carry(batch).await?;
        Ok(answer_of_batch(operations, &completions))
    }

    /// Sends a batch and waits for its answer.
    pub(crate) async fn carry(&mut self, batch: pb::DmaBatch) -> Result<pb::DmaCompletions, Stopped> {
        let shared = self.stream()?.shared();
        if batch.kind.iter().any(|kind| *kind != 0) {
            self.last_write = Some(batch.clone());
        }
        let answer = shared.submit(batch).await?;
        Ok(shared.answer(answer).await?)
    }

    /// Sends all that is queued, in order, before it reads the first answer.
    async fn release(&mut self) -> Result<Answer, Stopped> {
        let shared = self.stream()?.shared();
        let mut answers = Vec::new();
        while let Some(batch) = self.queued.pop_front() {
            let operations = batch.iova.len() as u64;
            answers.push((operations, shared.submit(batch).await?));
        }
        if answers.is_empty() {
            return wrong("nothing is queued; say dma with later");
        }
        let (mut operations, mut payload) = (0, Vec::new());
        let mut together = pb::DmaCompletions::default();
        for (count, answer) in answers {
            let completions = shared.answer(answer).await?;
            together
                .fault_index
                .extend(completions.fault_index.iter().map(|index| index.saturating_add(operations as u32)));
            together.fault_reason.extend(completions.fault_reason);
            together.fault_iova.extend(completions.fault_iova);
            together.fault_done_bytes.extend(completions.fault_done_bytes);
            payload.extend_from_slice(&completions.payload);
            operations += count;
        }
        together.payload = payload.into();
        Ok(answer_of_batch(operations, &together))
    }
}
