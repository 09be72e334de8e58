//! Lines of standard input, of bounded length, read by a thread of their own: reading blocks, and the stream of the device must not.

use std::io::{BufRead, Read};

use tokio::sync::mpsc;

use crate::bounds::LINE_BYTES_MAX;

/// Lines as they come.
#[derive(Debug)]
pub struct Lines(mpsc::Receiver<std::io::Result<String>>);

impl Lines {
    /// Of standard input.
    pub fn of_stdin() -> Self {
        let (sender, lines) = mpsc::channel(1);
        std::thread::spawn(move || {
            let mut input = std::io::stdin().lock();
            // It ends with the input, or when nobody listens any more.
            while let Some(line) = next(&mut input).transpose() {
                let is_last = line.is_err();
                if sender.blocking_send(line).is_err() || is_last {
                    return;
                }
            }
        });
        Self(lines)
    }

    /// The next one; `None` at the end.
    pub async fn next(&mut self) -> std::io::Result<Option<String>> {
        self.0.recv().await.transpose()
    }
}

fn next(input: &mut impl BufRead) -> std::io::Result<Option<String>> {
    let invalid = |why: String| std::io::Error::new(std::io::ErrorKind::InvalidData, why);
    let mut line = Vec::new();
    let read = input.take(LINE_BYTES_MAX as u64 + 1).read_until(b'\n', &mut line)?;
    if read > LINE_BYTES_MAX {
        return Err(invalid(format!("a line is longer than {LINE_BYTES_MAX} bytes")));
    }
    if read == 0 {
        return Ok(None);
    }
    String::from_utf8(line).map(Some).map_err(|error| invalid(error.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_have_a_bound_and_are_text() {
        let longest = vec![b'x'; LINE_BYTES_MAX];
        for (input, lines) in [
            (b"".to_vec(), vec![]),
            (b"a\nb".to_vec(), vec![Ok(2), Ok(1)]),
            (longest.clone(), vec![Ok(LINE_BYTES_MAX)]),
            ([longest, b"x".to_vec()].concat(), vec![Err(())]),
            (vec![0xff, b'\n'], vec![Err(())]),
        ] {
            let mut input = input.as_slice();
            let mut read = Vec::new();
            while let Some(line) = next(&mut input).transpose() {
                let length = line.map(|line| line.len()).map_err(|_| ());
                read.push(length);
                if length.is_err() {
                    break;
                }
            }
            assert_eq!(read, lines);
        }
    }
}
