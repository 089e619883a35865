// The requests of the page to the server.

/** The answer to a request, parsed from JSON. Throws an Error whose message can be shown. */
export async function ask(path, parameters = {}) {
  const answer = await fetch(`/api/${path}?${new URLSearchParams(parameters)}`);
  if (!answer.ok) throw new Error(answer.status === 401 ? (await answer.text()).trim() : `${path}: ${answer.status}`);
  return answer.json();
}

/** Curves in a window of steps: first and last step of each span, and by name the least, greatest and mean values. */
export const askCurves = (run, names, window, num) =>
  ask(`runs/${run}/curves`, { names: names.join(","), num, ...window });

/** Calls `take` with each summary, and `lost` with true while the server does not answer, with false when it does. */
export function listen(take, lost) {
  const source = new EventSource("/api/stream");
  source.onmessage = (message) => { lost(false); take(JSON.parse(message.data)); };
  source.onerror = () => {
    lost(true);
    // After an answer that is no event stream, such as an error of a proxy, a browser does not connect again by itself.
    if (source.readyState === EventSource.CLOSED) setTimeout(() => listen(take, lost), 3000);
  };
}
