//! A name server that answers as it is told.

use std::{
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use tokio::net::UdpSocket;

/// What a name server says of a name.
#[derive(Debug, Clone)]
pub(crate) enum Says {
    /// These are its addresses; of the other family it has none.
    Addresses(Vec<IpAddr>),
    /// It is another name for this one.
    Alias(&'static str),
    /// There is no such name.
    Missing,
    /// Nothing at all.
    Silence,
}

const A: u16 = 1;
const CNAME: u16 = 5;
const AAAA: u16 = 28;
/// Length of what stands before the question.
const HEAD: usize = 12;

/// Answers on `address` for as long as the runtime lives; `script` is asked for each query, with the name and `A` or
/// `AAAA`.
pub(crate) async fn serve_names(address: SocketAddr, script: impl Fn(&str, &str) -> Says + Send + 'static) {
    let socket = Arc::new(UdpSocket::bind(address).await.unwrap());
    tokio::spawn(async move {
        let mut buffer = [0; 1_500];
        loop {
            let (length, client) = socket.recv_from(&mut buffer).await.unwrap();
            let (name, kind, end) = question(&buffer[..length]);
            let family = if kind == AAAA { "AAAA" } else { "A" };
            if let Some(answer) = answer(&buffer[..end], kind, &script(&name, family)) {
                socket.send_to(&answer, client).await.unwrap();
            }
        }
    });
}

/// The name that is asked for, the type of record, and where the question ends.
fn question(query: &[u8]) -> (String, u16, usize) {
    let mut labels = Vec::new();
    let mut at = HEAD;
    while query[at] != 0 {
        let end = at + 1 + usize::from(query[at]);
        labels.push(String::from_utf8(query[at + 1..end].to_vec()).unwrap().to_lowercase());
        at = end;
    }
    (labels.join("."), u16::from_be_bytes([query[at + 1], query[at + 2]]), at + 5)
}

/// The answer to a query, of which only head and question are given; none is given to those who wait in vain.
fn answer(query: &[u8], kind: u16, says: &Says) -> Option<Vec<u8>> {
    let (code, records) = match says {
        Says::Silence => return None,
        Says::Missing => (3, Vec::new()),
        Says::Alias(name) => (0, vec![(CNAME, encoded(name))]),
        Says::Addresses(addresses) => {
            let records = addresses.iter().map(|address| match address {
                IpAddr::V4(address) => (A, address.octets().to_vec()),
                IpAddr::V6(address) => (AAAA, address.octets().to_vec()),
            });
            (0, records.filter(|(of, _)| *of == kind).collect())
        }
    };
    let mut message = query.to_vec();
    // An answer to a recursive query, with one question, the records, and nothing else.
    message[2..4].copy_from_slice(&[0x81, 0x80 | code]);
    message[6..HEAD].fill(0);
    message[7] = u8::try_from(records.len()).unwrap();
    for (kind, data) in records {
        // The name of the question, the class of the internet, remembered for no time.
        message.extend_from_slice(&[0xc0, 0x0c]);
        message.extend_from_slice(&kind.to_be_bytes());
        message.extend_from_slice(&[0, 1, 0, 0, 0, 0]);
        message.extend_from_slice(&u16::try_from(data.len()).unwrap().to_be_bytes());
        message.extend_from_slice(&data);
    }
    Some(message)
}

fn encoded(name: &str) -> Vec<u8> {
    let labels = name.split('.').flat_map(|label| {
        let length = u8::try_from(label.len()).unwrap();
        std::iter::once(length).chain(label.bytes()).collect::<Vec<_>>()
    });
    labels.chain([0]).collect()
}
