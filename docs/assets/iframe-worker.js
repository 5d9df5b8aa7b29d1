// Browsers refuse workers to a page that is opened from a disk. There, the script of a worker runs in a
// hidden frame instead, so search works without a server. The class has the name that the theme's search
// worker looks for in its parent.
if (location.protocol === "file:") {
  window.IFrameWorker = window.Worker = class extends EventTarget {
    constructor(url) {
      super()
      const frame = document.createElement("iframe")
      frame.hidden = true
      document.body.append(frame)
      this.inner = frame.contentWindow
      this.inner.answer = (data) => {
        const event = new MessageEvent("message", { data })
        this.dispatchEvent(event)
        if (this.onmessage) this.onmessage(event)
      }
      const setUp = `
        postMessage = answer
        importScripts = (...urls) => urls.reduce((before, url) => before.then(() => new Promise((done, failed) => {
          const script = document.createElement("script")
          script.onload = done
          script.onerror = failed
          script.src = url
          document.body.append(script)
        })), Promise.resolve())`
      this.ready = new Promise((done) => { frame.onload = done })
      this.inner.document.open()
      this.inner.document.write(`<body><script>${setUp}</` + `script><script src="${new URL(url, location)}"></` + "script>")
      this.inner.document.close()
    }
    postMessage(data) {
      this.ready.then(() => this.inner.dispatchEvent(new MessageEvent("message", { data })))
    }
    terminate() { this.inner.frameElement.remove() }
  }
}
