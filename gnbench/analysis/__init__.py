"""From records to tables, statistics, figures and a report. Nothing here needs torch.

table.load(directory)        records -> tidy frame, a row a run
statistics.summarize(frame)  -> a row a cell: mean, interval, what is missing
figures.*(frame, ax)         -> the paper's figures
claims.claims(frame)         -> the paper's statements, judged by these records
page.write_report(directories)  -> all of it as files and one HTML page
"""
